"""Captioning: masked prediction under BEiT-3's sequence-to-sequence mask, and generation one token at a time.

In training most of a caption is hidden and predicted from the picture and the tokens before (a caption token sees the
picture, earlier tokens and itself). A hidden token becomes the mask token in 80 % of the cases, any other token in
10 %, and stays in 10 %. Captions are written by :func:`~mhmoe_vl.models.generation.generate` and scored by BLEU,
ROUGE-L and CIDEr.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import distributed
from ..data.annotated import Example, PictureFolders, held_out, require_pictures
from ..data.captions import Captioned, read_captions
from ..data.loader import EvalBatches, StepDataset, eval_batches
from ..data.text import TextTokenizer
from ..data.transforms import ImageTransform
from ..errors import DataError
from ..metrics.captions import score_captions
from ..metrics.ptb_tokenizer import tokenize
from ..models.encoder import Encoder
from ..models.generation import generate
from ..models.heads import start
from .base import InputSpec, ModelOutput, Record, Task
from .encoder_model import EncoderModel
from .pair_batch import PairBatch, collate, listed, pair_tokenizer

SPLIT_FILE = "split.json"
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


class Captioning(Task):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        seed: of data order, augmentation, hidden tokens and the validation split.
        accumulate: parts that a step's batch is split into.
        others: the fields of the ``task`` section, in plain values.

    Raises:
        ConfigError: sizes do not fit together.
    """

    metric = "CIDEr"
    higher_is_better = True

    def __init__(
        self,
        inputs: InputSpec,
        *,
        seed: int,
        accumulate: int,
        data_dir: str,
        train: Mapping[str, Any],
        val: Mapping[str, Any] | None,
        test: Mapping[str, Any] | None,
        val_fraction: float,
        batch_size: int,
        max_text_len: int,
        mask_ratio: float,
        label_smoothing: float,
        drop_worst_ratio: float,
        drop_worst_after: int,
        num_beams: int,
        length_penalty: float,
        text_tokenizer: Mapping[str, Any],
        augment: Mapping[str, Any],
    ) -> None:
        self.inputs, self.seed, self.accumulate, self.data_dir = inputs, seed, accumulate, Path(data_dir)
        self.files = {"train": train, "val": val, "test": test}
        self.val_fraction, self.batch_size, self.max_text_len = val_fraction, batch_size, max_text_len
        self.mask_ratio, self.label_smoothing = mask_ratio, label_smoothing
        self.drop_worst_ratio, self.drop_worst_after = drop_worst_ratio, drop_worst_after
        self.search = {"num_beams": num_beams, "length_penalty": length_penalty, "max_len": max_text_len}
        self.augment = augment
        self.tokenizer = pair_tokenizer(inputs, text_tokenizer, max_text_len)
        self.kept: Mapping[str, str] = {}

    # ------------------------------------------------------------------------------------------ data
    @cached_property
    def _given(self) -> list[Example]:
        return self._read("train")

    @cached_property
    def _own_split(self) -> bool:
        """Whether the training file says itself which pictures are for what (Karpathy's does)."""
        return any(e.record.split is not None for e in self._given)

    @cached_property
    def _val_pictures(self) -> set[str]:
        """Pictures of the training file that validate where nothing else says which do, by key."""
        if self.files["val"] is not None or self._own_split:
            return set()
        if SPLIT_FILE in self.kept:
            return set(json.loads(self.kept[SPLIT_FILE])["validation_images"])
        return held_out((e.key for e in self._given), seed=self.seed, fraction=self.val_fraction)

    @cached_property
    def _train(self) -> list[Example]:
        """One example a caption."""
        mine = [e for e in _of_split(self._given, "train") if e.key not in self._val_pictures]
        found = [
            replace(e, key=f"{e.key}/{number}", record=e.record._replace(captions=(text,)))
            for e in mine
            for number, text in enumerate(e.record.captions)
        ]
        if not found:
            raise DataError(f"{self.files['train']['annotations']}: no caption to learn from (name another file)")
        return found

    @cached_property
    def _val(self) -> list[Example]:
        if self.files["val"] is not None:
            found = _of_split(self._read("val"), "val")
        elif self._own_split:
            found = _of_split(self._given, "val")
        else:
            found = [e for e in self._given if e.key in self._val_pictures]
        bare = [e.key for e in found if not e.record.captions]
        if bare:
            what = f"{len(bare)} of {len(found)} images without caption, first image {bare[0]}"
            raise DataError(f"{found[0].source}: {what} (validate on a split with captions)")
        require_pictures(found)
        return found

    def _read(self, split: str) -> list[Example]:
        files = self.files[split]
        folders = PictureFolders([self.data_dir / name for name in listed(files["images"])])
        return read_captions(self.data_dir / files["annotations"], folders)

    def dataset(self, split: str) -> StepDataset | EvalBatches:
        place = {"seed": self.seed, "rank": distributed.rank(), "world": distributed.world_size()}
        pictures = ImageTransform(self.inputs.img_size, train=split == "train", whole=True, **self.augment)
        batches = partial(_collate, pad_id=self.tokenizer.pad_id, img_size=self.inputs.img_size)
        if split == "train":
            examples = _TrainExamples(pictures, self.tokenizer, self.max_text_len, self.mask_ratio)
            streams = {"captions": (self._train, self.batch_size, examples)}
            steps = partial(_Steps, self.drop_worst_ratio, self.drop_worst_after)
            return steps(streams, partial(_collate_step, batches), accumulate=self.accumulate, **place)
        source = self._val if split == "val" else _of_split(self._read(split), split)
        require_pictures(source)
        return eval_batches(source, _EvalExamples(pictures), self.batch_size, batches, **place)

    def recorded(self) -> dict[str, str]:
        """Which pictures validate."""
        split = {
            "validation_images": sorted(self._val_pictures),
            "validation_pictures": len(self._val),
            "training_captions": len(self._train),
        }
        return {SPLIT_FILE: json.dumps(split, indent=0) + "\n"}

    def restore(self, files: Mapping[str, str]) -> None:
        self.kept = files

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> CaptioningModel:
        return CaptioningModel(encoder)

    def prepare(self, batch: CaptionBatch, device: torch.device) -> CaptionBatch:
        """``batch`` on ``device``, pictures in [-1, 1]."""
        return batch.prepared(device)

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
        counts = Counter(e.record.captions[0] for e in self._train)
        caption = min(counts, key=lambda text: (-counts[text], text))
        return self.score([_record(example) | {"caption": caption} for example in self._val])

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


class _Steps(StepDataset):
    """Batches that leave out the worst tokens from a step on."""

    def __init__(self, ratio: float, after: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ratio, self.after = ratio, after

    def __getitem__(self, step: int) -> list[CaptionBatch]:
        parts = super().__getitem__(step)
        return [replace(part, drop=self.ratio) for part in parts] if step >= self.after else parts


@dataclass(frozen=True)
class _TrainExamples:
    """From a picture with one caption to a masked example; picklable for data workers."""

    pictures: ImageTransform
    tokenizer: TextTokenizer
    max_len: int
    mask_ratio: float

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        ids = np.asarray(self.tokenizer.encode(example.record.captions[0], self.max_len))
        shown, targets = hide(ids, self.mask_ratio, self.tokenizer.mask_id, self.tokenizer.vocab_size, rng)
        picture = self.pictures(example.picture(), rng)
        return {"pictures": [picture], "text": shown, "targets": targets, "record": {"id": example.key}}


@dataclass(frozen=True)
class _EvalExamples:
    """From a picture to an example without text."""

    pictures: ImageTransform

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        picture = self.pictures(example.picture(), rng)
        return {"pictures": [picture], "text": [], "targets": [], "record": _record(example)}


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


def _of_split(examples: list[Example], split: str) -> list[Example]:
    """The examples that their file names for ``split``; all where it names none."""
    return [e for e in examples if e.record.split in (split, None)]


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


def _collate_step(batches: Any, streams: Mapping[str, list[dict[str, Any]]]) -> CaptionBatch:
    return batches(streams["captions"])
