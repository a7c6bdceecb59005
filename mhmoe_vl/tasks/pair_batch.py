"""Batches of annotated examples: pictures, a text, and targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.text import TextTokenizer, create_text_tokenizer, pad
from ..errors import ConfigError
from .base import InputSpec, Record


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
    """

    images: Tensor
    text: Tensor
    text_padding: Tensor
    targets: Tensor
    records: list[Record]
    bad: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def prepared(self, device: torch.device) -> PairBatch:
        """The batch on ``device``, pictures in [-1, 1]."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved | {"images": moved["images"].float() / 127.5 - 1})


def collate(
    examples: list[dict[str, Any]], targets: Tensor, *, num_pictures: int, pad_id: int, img_size: tuple[int, int]
) -> PairBatch:
    """A batch of examples (``pictures``, ``text``, ``record``), which may be none."""
    images = torch.empty(num_pictures, len(examples), 3, *img_size, dtype=torch.uint8)
    for row, example in enumerate(examples):
        for number, picture in enumerate(example["pictures"]):
            images[number, row] = picture
    text, padding = pad([example["text"] for example in examples], pad_id)
    return PairBatch(images.flatten(0, 1), text, padding, targets, [example["record"] for example in examples])


def pair_tokenizer(
    inputs: InputSpec, options: Mapping[str, Any], max_text_len: int, name: str = "max_text_len"
) -> TextTokenizer:
    """The text tokenizer of a task on pictures with texts.

    Raises:
        ConfigError: the encoder lacks a branch, text positions, or rows of the text embedding.
    """
    if set(inputs.modalities) != {"image", "text"}:
        raise ConfigError(f"encoder.modalities: {list(inputs.modalities)} (this task needs image and text)")
    if max_text_len > inputs.max_text_len:
        what = f"{max_text_len} with encoder.max_text_len {inputs.max_text_len}"
        raise ConfigError(f"task.{name}: {what} (lower it)")
    tokenizer = create_text_tokenizer(**options)
    if tokenizer.vocab_size > inputs.vocab_size:
        what = f"{inputs.vocab_size} rows for a tokenizer of {tokenizer.vocab_size} pieces"
        raise ConfigError(f"encoder.vocab_size: {what} (set it to {tokenizer.vocab_size})")
    return tokenizer


def listed(value: str | Iterable[str] | None) -> list[str]:
    """One path or several, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
