"""Captioning: masked prediction under BEiT-3's sequence-to-sequence mask, and generation one token at a time.

In training most of a caption is hidden and predicted from the picture and the tokens before (a caption token sees the
picture, earlier tokens and itself). A hidden token becomes the mask token in 80 % of the cases, any other token in
10 %, and stays in 10 %. Captions are written by :func:`~mhmoe_vl.models.generation.generate` and scored by BLEU,
ROUGE-L and CIDEr.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data.annotated import Example, held_out
from ..data.captions import Captioned, read_captions
from ..data.loader import EvalBatches, StepDataset, Transform
from ..data.text import TextTokenizer
from ..data.transforms import ImageTransform
from ..errors import DataError
from ..metrics.captions import score_captions
from ..metrics.ptb_tokenizer import tokenize
from ..models.encoder import Encoder
from ..models.generation import generate
from ..models.heads import start
from .annotated_task import AnnotatedTask
from .base import InputSpec, ModelOutput, Record
from .encoder_model import EncoderModel
from .pair_batch import PairBatch, collate, read_text

NOT_HIDDEN = -100
KEPT, EXCHANGED = 0.1, 0.1
"""Shares of the hidden tokens that stay as they are, and that become any other token."""


@dataclass(frozen=True)
class CaptionBatch(PairBatch):
    """``targets (B, L)`` are the hidden tokens, :data:`NOT_HIDDEN` elsewhere.

    Attributes:
        drop: share of the hidden tokens, those of the largest loss, that the loss leaves out.
    """

    drop: float = 0.0


class CaptioningModel(EncoderModel):
    """Encoder and text head; the head carries the name and shape of pre-training's.

    Args:
        encoder: for images and texts.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.mlm_head = start(nn.Linear(encoder.embed_dim, encoder.vocab_size))

    def forward(self, batch: CaptionBatch) -> ModelOutput:
        """``logits (M, vocab_size)`` at the hidden tokens."""
        features = self.encoder(
            batch.images, batch.text, text_padding=batch.text_padding, num_pairs=len(batch), causal_text=True
        )
        hidden = (batch.targets != NOT_HIDDEN).flatten().nonzero().flatten()
        return self.output({"logits": self.mlm_head(features.text.flatten(0, 1).index_select(0, hidden))}, features)


class Captioning(AnnotatedTask):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        val_fraction: share of the pictures to hold out for validation where the file does not say which.
        mask_ratio: share of a caption's tokens that is hidden.
        label_smoothing: probability spread over all tokens in the targets.
        drop_worst_ratio, drop_worst_after: share of the hidden tokens, those of the largest loss, that the loss leaves
            out, and the step from which it does.
        num_beams, length_penalty: of generation.
        others: see :class:`AnnotatedTask`.
    """

    metric = "CIDEr"

    def __init__(
        self,
        inputs: InputSpec,
        *,
        val_fraction: float,
        mask_ratio: float,
        label_smoothing: float,
        drop_worst_ratio: float,
        drop_worst_after: int,
        num_beams: int,
        length_penalty: float,
        **others: Any,
    ) -> None:
        super().__init__(inputs, **others)
        self.val_fraction, self.mask_ratio, self.label_smoothing = val_fraction, mask_ratio, label_smoothing
        self.drop_worst_ratio, self.drop_worst_after = drop_worst_ratio, drop_worst_after
        self.search = {"num_beams": num_beams, "length_penalty": length_penalty, "max_len": self.max_text_len}

    # ------------------------------------------------------------------------------------------ data
    def read(self, split: str) -> list[Example]:
        """All pictures of the training file; of the others those that the file names for ``split``, if it does."""
        path = self.data_dir / self.files[split]["annotations"]
        found = read_captions(path, self.folders(split))
        if split != "train":
            found = [e for e in found if e.record.split in (split, None)]
        if not found:
            raise DataError(f"{path}: no picture of split {split} (name another file as task.{split})")
        return found

    def group(self, example: Example) -> str:
        return example.key

    def choose_validation(self) -> set[str]:
        """Those that the file names (Karpathy's does), else a share by seed."""
        named = {e.key for e in self.given if e.record.split == "val"}
        return named or held_out(map(self.group, self.given), seed=self.seed, fraction=self.val_fraction)

    @cached_property
    def train(self) -> list[Example]:
        """One example a caption."""
        found = [
            replace(e, key=f"{e.key}/{number}", record=e.record._replace(captions=(text,)))
            for e in self.remaining
            if e.record.split in ("train", None)
            for number, text in enumerate(e.record.captions)
        ]
        if not found:
            raise DataError(f"{self.files['train']['annotations']}: no caption to learn from (name another file)")
        return found

    @cached_property
    def val(self) -> list[Example]:
        found = super().val
        bare = [e.key for e in found if not e.record.captions]
        if bare:
            what = f"{len(bare)} of {len(found)} images without caption, first image {bare[0]}"
            raise DataError(f"{found[0].source}: {what} (validate on a split with captions)")
        return found

    def dataset(self, split: str) -> Dataset | EvalBatches:
        found = super().dataset(split)
        return _DropWorst(found, self.drop_worst_ratio, self.drop_worst_after) if split == "train" else found

    def transform(self, pictures: ImageTransform, *, train: bool) -> Transform:
        if train:
            return _TrainExamples(pictures, self.tokenizer, self.max_text_len, self.mask_ratio)
        return _EvalExamples(pictures)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], CaptionBatch]:
        return partial(_collate, pad_id=self.tokenizer.pad_id, img_size=self.inputs.img_size)

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> CaptioningModel:
        return CaptioningModel(encoder)

    def num_targets(self, batch: CaptionBatch) -> dict[str, int]:
        """Hidden tokens that the loss counts."""
        return {"caption": _counted(batch)}

    def loss(self, output: ModelOutput, batch: CaptionBatch) -> dict[str, Tensor]:
        """Smoothed cross-entropy summed over the hidden tokens, the worst ones left out once that has begun."""
        targets = batch.targets[batch.targets != NOT_HIDDEN]
        rows = F.cross_entropy(
            output.values["logits"].float(), targets, label_smoothing=self.label_smoothing, reduction="none"
        )
        return {"caption": rows.topk(_counted(batch), largest=False).values.sum()}

    # ------------------------------------------------------------------------------------ evaluation
    def predict(self, model: nn.Module, batch: CaptionBatch) -> list[Record]:
        """Per picture: the caption that the model writes."""
        tokenizer = self.tokenizer
        unused = range(tokenizer.vocab_size, self.inputs.vocab_size)
        special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "mask_id": tokenizer.mask_id}
        forbidden = [tokenizer.pad_id, *unused]
        texts = generate(model.encoder, model.mlm_head, batch.images, forbidden_ids=forbidden, **special, **self.search)
        captions = [" ".join(tokenizer.decode(ids).split()) for ids in texts]
        return [{**record, "caption": caption} for record, caption in zip(batch.records, captions, strict=True)]

    def score(self, records: list[Record]) -> dict[str, float]:
        """``Bleu_1`` to ``Bleu_4``, ``ROUGE_L`` and ``CIDEr``; nothing for a split without captions."""
        if not records or not all(record["references"] for record in records):
            return {}
        references = {r["id"]: [tokenize(text) for text in r["references"]] for r in records}
        return dict(score_captions(references, {r["id"]: tokenize(r["caption"]) for r in records}).corpus)

    def baselines(self, device: torch.device) -> dict[str, float]:
        """Scores of the single most frequent training caption for every picture."""
        counts = Counter(e.record.captions[0] for e in self.train)
        caption = min(counts, key=lambda text: (-counts[text], text))
        return self.score([_record(example) | {"caption": caption} for example in self.val])

    def gallery(self, records: list[Record]) -> list[dict[str, Any]]:
        """Captions with those of the annotators."""
        return [
            {
                "images": [record["image"]],
                "caption": record["caption"],
                "right": None,
                "rows": [["reference", text] for text in record["references"]],
                "bars": [],
            }
            for record in records
        ]

    def submission(self, records: list[Record]) -> dict[str, str]:
        """The results file in COCO's format."""
        captions = [{"image_id": r["image_id"], "caption": r["caption"]} for r in records]
        return {"captions_results.json": json.dumps(captions, ensure_ascii=False) + "\n"}


class _DropWorst(Dataset):
    """The batches of ``steps``, from step ``after`` on with the share to leave out."""

    def __init__(self, steps: StepDataset, ratio: float, after: int) -> None:
        self.steps, self.ratio, self.after = steps, ratio, after

    def __getitem__(self, step: int) -> list[CaptionBatch]:
        parts = self.steps[step]
        return [replace(part, drop=self.ratio) for part in parts] if step >= self.after else parts


@dataclass(frozen=True)
class _TrainExamples:
    """From a picture with one caption to a masked example."""

    pictures: ImageTransform
    tokenizer: TextTokenizer
    max_len: int
    mask_ratio: float

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        text = read_text(self.tokenizer, example.record.captions[0], self.max_len)
        ids = np.asarray(text["text"])
        shown, targets = hide(ids, self.mask_ratio, self.tokenizer.mask_id, self.tokenizer.vocab_size, rng)
        seen = {"pictures": [example.pixels(self.pictures, rng)], "text": shown, "cut": text["cut"]}
        return {**seen, "targets": targets, "record": {"id": example.key}}


@dataclass(frozen=True)
class _EvalExamples:
    """From a picture to an example without text."""

    pictures: ImageTransform

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        picture = example.pixels(self.pictures, rng)
        return {"pictures": [picture], "text": [], "cut": False, "targets": [], "record": _record(example)}


def hide(
    ids: np.ndarray, ratio: float, mask_id: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What the model sees of a caption, and the tokens to predict (:data:`NOT_HIDDEN` elsewhere), both ``(L,)``.

    At least one token is hidden; the first never is, the end may be.
    """
    count = max(1, round(ratio * (len(ids) - 1)))
    hidden = 1 + rng.permutation(len(ids) - 1)[:count]
    fate = rng.random(count)
    others = rng.integers(vocab_size, size=count)
    shown, targets = ids.copy(), np.full_like(ids, NOT_HIDDEN)
    targets[hidden] = ids[hidden]
    shown[hidden] = np.where(fate < KEPT, ids[hidden], np.where(fate < KEPT + EXCHANGED, others, mask_id))
    return shown, targets


def _counted(batch: CaptionBatch) -> int:
    hidden = int((batch.targets != NOT_HIDDEN).sum())
    return hidden - int(batch.drop * hidden)


def _record(example: Example) -> Record:
    picture: Captioned = example.record
    return {
        "id": picture.image_id,
        "image_id": picture.image_id,
        "image": str(example.pictures[0]),
        "references": list(picture.captions),
    }


def _collate(examples: list[dict[str, Any]], *, pad_id: int, img_size: tuple[int, int]) -> CaptionBatch:
    plain = collate(examples, torch.empty(0), num_pictures=1, pad_id=pad_id, img_size=img_size)
    targets = torch.full_like(plain.text, NOT_HIDDEN)
    for row, example in enumerate(examples):
        targets[row, : len(example["targets"])] = torch.as_tensor(example["targets"], dtype=torch.int64)
    return CaptionBatch(**vars(plain) | {"targets": targets})
