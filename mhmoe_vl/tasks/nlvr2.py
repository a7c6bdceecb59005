"""NLVR2: is a sentence true of its pictures?

As BEiT-3 does it: the sentence passes the encoder once with each picture, by the same weights, and a classifier reads
the picture's class token and the sentence's first token of all passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import distributed
from ..data.annotated import Example, PictureFolders, held_out, require_pictures
from ..data.loader import EvalBatches, StepDataset, eval_batches
from ..data.nlvr2 import Statement, read_statements
from ..data.text import TextTokenizer
from ..data.transforms import Box, ImageTransform
from ..errors import DataError
from ..metrics.nlvr2 import score_nlvr2, sentence_key, to_csv
from ..models.encoder import Encoder
from ..models.heads import StatementHead
from .base import InputSpec, ModelOutput, Record, Task
from .encoder_model import EncoderModel
from .pair_batch import PairBatch, collate, listed, pair_tokenizer

SPLIT_FILE = "split.json"
REGIONS: dict[str, tuple[tuple[int, Box | None], ...]] = {
    "pair": ((0, None), (1, None)),
    "whole": ((0, None),),
    "boxes": tuple((0, (0, left, 100, 100)) for left in (0, 150, 300)),
}
"""What passes the encoder: number of the file, and the part of it (top, left, height, width). NLVR's drawn pictures are
400 x 100 pixels and hold three boxes."""


class NLVR2Model(EncoderModel):
    """Encoder and statement head.

    Args:
        encoder: for images and texts.
        num_pictures: passes per example.
    """

    def __init__(self, encoder: Encoder, *, num_pictures: int) -> None:
        super().__init__(encoder)
        self.num_pictures = num_pictures
        self.head = StatementHead(encoder.embed_dim, 2 * num_pictures, norm_eps=encoder.norm_eps)

    def forward(self, batch: PairBatch) -> ModelOutput:
        """``logits (B, 2)``, false and true."""
        n = self.num_pictures
        features = self.encoder(
            batch.images,
            batch.text.repeat(n, 1),
            text_padding=batch.text_padding.repeat(n, 1),
            num_pairs=len(batch.images),
        )
        passes = torch.cat([features.image[:, 0], features.text[:, 0]], dim=1).chunk(n) if len(batch) else None
        joined = (
            torch.cat(passes, dim=1) if passes else features.image.new_zeros(0, self.head.norm1.normalized_shape[0])
        )
        return self.output({"logits": self.head(joined)}, features)


class NLVR2(Task):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        seed: of data order, augmentation and the validation split.
        accumulate: parts that a step's batch is split into.
        others: the fields of the ``task`` section, in plain values.

    Raises:
        ConfigError: sizes do not fit together.
    """

    metric = "accuracy"
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
        pictures: str,
        batch_size: int,
        max_text_len: int,
        text_tokenizer: Mapping[str, Any],
        augment: Mapping[str, Any],
    ) -> None:
        self.inputs, self.seed, self.accumulate, self.data_dir = inputs, seed, accumulate, Path(data_dir)
        self.files = {"train": train, "val": val, "test": test}
        self.val_fraction, self.regions, self.pictures = val_fraction, REGIONS[pictures], pictures
        self.batch_size, self.max_text_len, self.augment = batch_size, max_text_len, augment
        self.tokenizer = pair_tokenizer(inputs, text_tokenizer, max_text_len)
        self.kept: Mapping[str, str] = {}

    # ------------------------------------------------------------------------------------------ data
    @cached_property
    def _given(self) -> list[Example]:
        return self._read("train")

    @cached_property
    def _val_sentences(self) -> set[str]:
        """Sentences of the training file that validate; none where validation has a file of its own."""
        if self.files["val"] is not None:
            return set()
        if SPLIT_FILE in self.kept:
            return set(json.loads(self.kept[SPLIT_FILE])["validation_sentences"])
        return held_out((sentence_key(e.key) for e in self._given), seed=self.seed, fraction=self.val_fraction)

    @cached_property
    def _train(self) -> list[Example]:
        return [e for e in self._given if sentence_key(e.key) not in self._val_sentences]

    @cached_property
    def _val(self) -> list[Example]:
        own = self.files["val"] is not None
        found = self._read("val") if own else [e for e in self._given if sentence_key(e.key) in self._val_sentences]
        require_pictures(found)
        return found

    def _read(self, split: str) -> list[Example]:
        files = self.files[split]
        path = self.data_dir / files["annotations"]
        found = read_statements(path, PictureFolders([self.data_dir / name for name in listed(files["images"])]))
        wanted = 1 + max(number for number, _ in self.regions)
        if len(found[0].pictures) != wanted:
            other = "boxes or whole" if wanted == 2 else "pair"
            what = f"{found[0].key} has {len(found[0].pictures)} pictures, task.pictures {self.pictures} takes {wanted}"
            raise DataError(f"{path}: {what} (set it to {other})")
        unlabelled = [example.key for example in found if example.record.label is None]
        if unlabelled and split != "test":
            what = f"{len(unlabelled)} of {len(found)} examples without label, first {unlabelled[0]}"
            raise DataError(f"{path}: {what} (give a split with labels, or name it task.test)")
        return found

    def dataset(self, split: str) -> StepDataset | EvalBatches:
        place = {"seed": self.seed, "rank": distributed.rank(), "world": distributed.world_size()}
        transform = ImageTransform(self.inputs.img_size, train=split == "train", whole=True, **self.augment)
        examples = _Examples(transform, self.regions, self.tokenizer, self.max_text_len)
        sizes = {"pad_id": self.tokenizer.pad_id, "img_size": self.inputs.img_size, "num_pictures": len(self.regions)}
        batches = partial(_collate, **sizes)
        if split == "train":
            streams = {"statements": (self._train, self.batch_size, examples)}
            return StepDataset(streams, partial(_collate_step, batches), accumulate=self.accumulate, **place)
        source = self._val if split == "val" else self._read(split)
        require_pictures(source)
        return eval_batches(source, examples, self.batch_size, batches, **place)

    def recorded(self) -> dict[str, str]:
        """Which sentences validate."""
        split = {
            "validation_sentences": sorted(self._val_sentences),
            "validation_examples": len(self._val),
            "training_examples": len(self._train),
        }
        return {SPLIT_FILE: json.dumps(split, indent=0) + "\n"}

    def restore(self, files: Mapping[str, str]) -> None:
        self.kept = files

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> NLVR2Model:
        return NLVR2Model(encoder, num_pictures=len(self.regions))

    def prepare(self, batch: PairBatch, device: torch.device) -> PairBatch:
        """``batch`` on ``device``, pictures in [-1, 1]."""
        return batch.prepared(device)

    def num_targets(self, batch: PairBatch) -> dict[str, int]:
        """Statements."""
        return {"truth": len(batch)}

    def loss(self, output: ModelOutput, batch: PairBatch) -> dict[str, Tensor]:
        """Cross-entropy summed over statements."""
        return {"truth": F.cross_entropy(output.values["logits"].float(), batch.targets, reduction="sum")}

    # ------------------------------------------------------------------------------------ evaluation
    def predict(self, model: nn.Module, batch: PairBatch) -> list[Record]:
        """Per statement: its truth, and the probability that it is true."""
        probabilities = model(batch).values["logits"].float().softmax(-1)[:, 1].tolist()
        return [
            {**record, "prediction": p > 0.5, "probability": p}
            for record, p in zip(batch.records, probabilities, strict=True)
        ]

    def score(self, records: list[Record]) -> dict[str, float]:
        """``accuracy`` and ``consistency``; nothing for a split without labels."""
        if not records or any(record["label"] is None for record in records):
            return {}
        predictions = {record["id"]: record["prediction"] for record in records}
        return score_nlvr2(predictions, {record["id"]: record["label"] for record in records})

    def baselines(self, device: torch.device) -> dict[str, float]:
        """Scores of always giving the training split's more frequent label."""
        majority = sum(example.record.label for example in self._train) * 2 >= len(self._train)
        return self.score([_record(example) | {"prediction": majority} for example in self._val])

    def gallery(self, records: list[Record]) -> list[dict[str, Any]]:
        """Sentences with the probability that they are true as a bar."""
        return [
            {
                "images": record["images"],
                "caption": record["sentence"],
                "right": None if record["label"] is None else record["prediction"] == record["label"],
                "rows": [["answer", str(record["prediction"])], ["true answer", str(record["label"])]],
                "bars": [["True", record["probability"]], ["False", 1 - record["probability"]]],
            }
            for record in records
        ]

    def submission(self, records: list[Record]) -> dict[str, str]:
        """The official CSV."""
        return {"nlvr2_predictions.csv": to_csv({record["id"]: record["prediction"] for record in records})}


@dataclass(frozen=True)
class _Examples:
    """From an annotated statement to an example; picklable for data workers."""

    transform: ImageTransform
    regions: tuple[tuple[int, Box | None], ...]
    tokenizer: TextTokenizer
    max_len: int

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        pictures = [self.transform(example.picture(number), rng, region) for number, region in self.regions]
        text = self.tokenizer.encode(example.record.sentence, self.max_len)
        return {"pictures": pictures, "text": text, "record": _record(example)}


def _record(example: Example) -> Record:
    statement: Statement = example.record
    return {
        "id": statement.identifier,
        "identifier": statement.identifier,
        "sentence": statement.sentence,
        "images": [str(path) for path in example.pictures],
        "label": statement.label,
    }


def _collate(examples: list[dict[str, Any]], **sizes: Any) -> PairBatch:
    labels = torch.tensor([bool(example["record"]["label"]) for example in examples], dtype=torch.int64)
    return collate(examples, labels, **sizes)


def _collate_step(batches: Any, streams: Mapping[str, list[dict[str, Any]]]) -> PairBatch:
    return batches(streams["statements"])
