"""NLVR2: is a sentence true of its pictures?

As BEiT-3 does it: the sentence passes the encoder once with each picture, by the same weights, and a classifier reads
the picture's class token and the sentence's first token of all passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.annotated import Example, held_out
from ..data.nlvr2 import Statement, read_statements
from ..data.text import TextTokenizer
from ..data.transforms import Box, ImageTransform
from ..errors import DataError
from ..metrics.nlvr2 import score_nlvr2, sentence_key, to_csv
from ..models.encoder import Encoder
from ..models.heads import StatementHead
from .annotated_task import AnnotatedTask
from .base import InputSpec, ModelOutput, Record
from .encoder_model import EncoderModel
from .pair_batch import PairBatch, collate, read_text

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
        passes = torch.cat([features.image[:, 0], features.text[:, 0]], dim=1)
        joined = passes.view(n, len(batch), -1).transpose(0, 1).reshape(len(batch), n * passes.shape[1])
        return self.output({"logits": self.head(joined)}, features)


class NLVR2(AnnotatedTask):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        val_fraction: share of the sentences to hold out for validation.
        pictures: among :data:`REGIONS`.
        others: see :class:`AnnotatedTask`.
    """

    metric = "accuracy"

    def __init__(self, inputs: InputSpec, *, val_fraction: float, pictures: str, **others: Any) -> None:
        super().__init__(inputs, **others)
        self.val_fraction, self.pictures, self.regions = val_fraction, pictures, REGIONS[pictures]

    # ------------------------------------------------------------------------------------------ data
    def read(self, split: str) -> list[Example]:
        path = self.data_dir / self.files[split]["annotations"]
        found = read_statements(path, self.folders(split))
        wanted = 1 + max(number for number, _ in self.regions)
        if len(found[0].pictures) != wanted:
            other = "boxes or whole" if wanted == 2 else "pair"
            what = f"{found[0].key} has {len(found[0].pictures)} pictures, task.pictures {self.pictures} takes {wanted}"
            raise DataError(f"{path}: {what} (set it to {other})")
        if found[0].record.label is None and split != "test":
            raise DataError(f"{path}: no labels (give a split with labels, or name it task.test)")
        return found

    def group(self, example: Example) -> str:
        return sentence_key(example.key)

    def choose_validation(self) -> set[str]:
        return held_out(map(self.group, self.given), seed=self.seed, fraction=self.val_fraction)

    def transform(self, pictures: ImageTransform, *, train: bool) -> _Examples:
        return _Examples(pictures, self.regions, self.tokenizer, self.max_text_len)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], PairBatch]:
        sizes = {"pad_id": self.tokenizer.pad_id, "img_size": self.inputs.img_size}
        return partial(_collate, num_pictures=len(self.regions), **sizes)

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> NLVR2Model:
        return NLVR2Model(encoder, num_pictures=len(self.regions))

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
        majority = sum(example.record.label for example in self.train) * 2 >= len(self.train)
        return self.score([_record(example) | {"prediction": majority} for example in self.val])

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
    """From an annotated statement to an example."""

    transform: ImageTransform
    regions: tuple[tuple[int, Box | None], ...]
    tokenizer: TextTokenizer
    max_len: int

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        pictures = [example.pixels(self.transform, rng, region, number=number) for number, region in self.regions]
        text = read_text(self.tokenizer, example.record.sentence, self.max_len)
        return {"pictures": pictures, **text, "record": _record(example)}


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
