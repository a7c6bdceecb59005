"""Batches of annotated examples: pictures, a text, and targets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.text import TextTokenizer, pad
from .base import Record


@dataclass(frozen=True)
class PairBatch:
    """Examples of one or several pictures and a text each.

    Attributes:
        images: ``(n * B, 3, H, W)`` uint8, after ``prepare`` normalised float: the first picture of every example,
            then the second ones, and so on.
        text: ``(B, L)`` ids.
        text_padding: ``(B, L)`` bool, True at padding.
        targets: ``(B, ...)``, the task's own.
        records: what is known of each example.
        bad: examples left out, by reason.
        texts_cut: examples whose text is longer than what is read of it.
    """

    images: Tensor
    text: Tensor
    text_padding: Tensor
    targets: Tensor
    records: list[Record]
    bad: dict[str, int] = field(default_factory=dict)
    texts_cut: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def prepared(self, device: torch.device) -> PairBatch:
        """The batch on ``device``, pictures in [-1, 1]."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved | {"images": moved["images"].float() / 127.5 - 1})


def read_text(tokenizer: TextTokenizer, text: str, max_len: int) -> dict[str, Any]:
    """The ``text`` of an example, at most ``max_len`` ids, and whether it is ``cut``."""
    ids = tokenizer.encode(text, max_len + 1)
    cut = len(ids) > max_len
    return {"text": [*ids[: max_len - 1], ids[-1]] if cut else ids, "cut": cut}


def collate(
    examples: list[dict[str, Any]], targets: Tensor, *, num_pictures: int, pad_id: int, img_size: tuple[int, int]
) -> PairBatch:
    """A batch of examples (``pictures``, ``record`` and what :func:`read_text` gives), which may be none."""
    images = torch.empty(num_pictures, len(examples), 3, *img_size, dtype=torch.uint8)
    for row, example in enumerate(examples):
        for number, picture in enumerate(example["pictures"]):
            images[number, row] = picture
    text, padding = pad([example["text"] for example in examples], pad_id)
    records, cut = [example["record"] for example in examples], sum(example["cut"] for example in examples)
    return PairBatch(images.flatten(0, 1), text, padding, targets, records, texts_cut=cut)
