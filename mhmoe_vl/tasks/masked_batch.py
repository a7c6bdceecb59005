"""Batches of masked pictures and texts: what is hidden, where, and what stood there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.masking import block_mask, text_mask
from ..data.sample import Sample
from ..data.text import TextTokenizer
from ..data.transforms import ImageTransform
from .base import Record

STREAMS = ("images", "texts", "pairs")
TERMS = (
    ("images", "images", "image_mask"),
    ("texts", "texts", "text_mask"),
    ("pairs_image", "pairs", "image_mask"),
    ("pairs_text", "pairs", "text_mask"),
)
"""The four predictions, each with its stream and its mask: codes of pictures alone, pieces of texts alone, and both
in pairs."""


@dataclass(frozen=True)
class MaskedBatch:
    """Pictures of the image stream, then of the pairs; texts of the text stream, then of the pairs.

    Attributes:
        images: ``(I, 3, H, W)`` uint8, after ``prepare`` normalised float.
        tokenizer_images: the same crops at the tokenizer's size, uint8.
        image_mask: ``(I, P)`` bool, True where a patch is hidden.
        image_positions: ``(M,)`` the hidden patches as indices into ``(I * P)``, by picture.
        image_targets: ``(M,)`` codes to predict; filled by ``prepare``.
        text: ``(T, L)`` ids with the mask token in place.
        text_padding: ``(T, L)`` bool, True at padding.
        text_positions: ``(M',)`` the hidden pieces as indices into ``(T * L)``, by text.
        text_targets: ``(M',)`` ids to predict.
        num_pairs: how many of the last pictures belong, in order, to as many last texts.
        samples: by term, the sample of its stream that each hidden position belongs to.
        ids: per stream, one id a sample.
        bad: samples left out, by reason.
    """

    images: Tensor | None = None
    tokenizer_images: Tensor | None = None
    image_mask: Tensor | None = None
    image_positions: Tensor | None = None
    image_targets: Tensor | None = None
    text: Tensor | None = None
    text_padding: Tensor | None = None
    text_positions: Tensor | None = None
    text_targets: Tensor | None = None
    num_pairs: int = 0
    samples: dict[str, Tensor] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(ids) for ids in self.ids.values())

    def terms(self) -> Iterator[tuple[str, str, slice]]:
        """``(term, "image" or "text", its rows among the logits)`` of every term with targets."""
        for kind, alone in (("image", "images"), ("text", "texts")):
            first = 0
            for term in (alone, f"pairs_{kind}"):
                count = len(self.samples.get(term, ()))
                if count:
                    yield term, kind, slice(first, first + count)
                first += count


@dataclass(frozen=True)
class MaskedExamples:
    """From a raw sample of one stream to a masked example; picklable, so that data workers can be sent it.

    Args:
        stream: ``images``, ``texts`` or ``pairs``.
        tokenizer, max_text_len: longer texts are cut, the end token kept.
        pictures: gives the model's crop first and the tokenizer's last.
        grid: patches (rows, columns).
        num_masked, min_block: hidden patches, and the smallest block of them.
        text_ratio: share of text pieces hidden.
        train: draw one of several captions instead of taking the first.
    """

    stream: str
    tokenizer: TextTokenizer
    max_text_len: int
    pictures: ImageTransform
    grid: tuple[int, int]
    num_masked: int
    min_block: int
    text_ratio: float
    train: bool

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        example: dict[str, Any] = {"id": f"{self.stream}/{sample.index:09d}"}
        if self.stream != "texts":
            example["pictures"] = self.pictures(sample.image(), rng)
            example["image_mask"] = block_mask(*self.grid, self.num_masked, self.min_block, rng).reshape(-1)
        if self.stream != "images":
            texts = sample.captions()
            text = texts[rng.integers(len(texts))] if self.train else texts[0]
            ids = np.asarray(self.tokenizer.encode(text, self.max_text_len))
            example |= {"text": ids, "text_mask": text_mask(ids, self.tokenizer.special_ids, self.text_ratio, rng)}
        return example


def collate(examples: Mapping[str, list[dict[str, Any]]], *, pad_id: int, mask_id: int) -> MaskedBatch:
    """One batch from the examples of each stream, image and text parts joined with those of the pairs."""
    images = list(chain(examples.get("images", ()), examples.get("pairs", ())))
    texts = list(chain(examples.get("texts", ()), examples.get("pairs", ())))
    fields: dict[str, Any] = {}
    if images:
        mask = torch.from_numpy(np.stack([e["image_mask"] for e in images]))
        fields.update(
            images=torch.stack([e["pictures"][0] for e in images]),
            tokenizer_images=torch.stack([e["pictures"][-1] for e in images]),
            image_mask=mask,
            image_positions=mask.flatten().nonzero().flatten(),
        )
    if texts:
        fields.update(_collate_texts(texts, pad_id, mask_id))
    samples = {
        term: torch.from_numpy(np.repeat(np.arange(len(found)), [int(e[mask].sum()) for e in found]))
        for term, stream, mask in TERMS
        if (found := examples.get(stream))
    }
    ids = {name: [e["id"] for e in found] for name, found in examples.items()}
    num_pairs = len(examples.get("pairs", ()))
    return MaskedBatch(**fields, num_pairs=num_pairs, samples=samples, ids=ids)


def _collate_texts(texts: list[dict[str, Any]], pad_id: int, mask_id: int) -> dict[str, Tensor]:
    length = max(len(e["text"]) for e in texts)
    ids = np.full((len(texts), length), pad_id, dtype=np.int64)
    padding, mask = np.ones_like(ids, dtype=bool), np.zeros_like(ids, dtype=bool)
    for row, example in enumerate(texts):
        n = len(example["text"])
        ids[row, :n], padding[row, :n], mask[row, :n] = example["text"], False, example["text_mask"]
    return {
        "text": torch.from_numpy(np.where(mask, mask_id, ids)),
        "text_padding": torch.from_numpy(padding),
        "text_positions": torch.from_numpy(np.flatnonzero(mask)),
        "text_targets": torch.from_numpy(ids[mask]),
    }


def per_sample(batch: MaskedBatch, results: dict[str, tuple[Tensor, Tensor]]) -> list[Record]:
    """One record a sample: summed loss, right predictions and count by term.

    Args:
        batch: gives the samples' ids.
        results: by term, loss and whether the prediction is right at every masked position.
    """
    records: dict[str, Record] = {}
    for term, (loss, right) in results.items():
        ids = batch.ids[term.split("_")[0]]
        values = torch.stack([loss.double(), right.double(), torch.ones_like(loss, dtype=torch.float64)], 1).cpu()
        sums = torch.zeros(len(ids), 3, dtype=torch.float64).index_add_(0, batch.samples[term], values)
        for identity, numbers in zip(ids, sums.tolist(), strict=True):
            records.setdefault(identity, {"id": identity, "terms": {}})["terms"][term] = numbers
    return list(records.values())
