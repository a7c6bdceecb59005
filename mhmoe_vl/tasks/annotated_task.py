"""What the tasks on annotation files have in common: files by split, a validation split by seed, batches.

A sub-class says how a split is read, what becomes of an example, and what is learnt from it.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..data.annotated import Example, PictureFolders, require_pictures
from ..data.loader import EvalBatches, StepDataset, Transform, eval_batches
from ..data.text import create_text_tokenizer
from ..data.transforms import ImageTransform
from ..errors import ConfigError
from .base import Batch, InputSpec, Task

SPLIT_FILE = "split.json"


class AnnotatedTask(Task):
    """A task on annotated pictures.

    Args:
        inputs: sizes that the encoder expects.
        seed: of data order, augmentation and the validation split.
        accumulate: parts that a step's batch is split into.
        others: the fields that the ``task`` sections share, in plain values.

    Attributes:
        files: the section of every split, none where it is not set.
        kept: what the run recorded, when it is evaluated.
    """

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
        batch_size: int,
    ) -> None:
        self.inputs, self.seed, self.accumulate, self.data_dir = inputs, seed, accumulate, Path(data_dir)
        self.files = {"train": train, "val": val, "test": test}
        self.batch_size = batch_size
        self.kept: Mapping[str, str] = {}

    # ------------------------------------------------------------------------- what a sub-class says
    @abstractmethod
    def read(self, split: str) -> list[Example]:
        """The examples in the files of a split."""

    @abstractmethod
    def group(self, example: Example) -> Hashable:
        """What examples must share to be on the same side of the validation split; a JSON value."""

    @abstractmethod
    def choose_validation(self) -> set[Any]:
        """The groups of the training files that validate, while ``task.val`` is not set."""

    @abstractmethod
    def transform(self, *, train: bool) -> Transform:
        """From an annotated example to one of a batch; picklable for data workers."""

    @property
    @abstractmethod
    def collate(self) -> Callable[[list[Any]], Batch]:
        """From such examples, which may be none, to a batch; picklable too."""

    # ------------------------------------------------------------------------------------------ data
    @cached_property
    def given(self) -> list[Example]:
        """All examples of the training files."""
        return self.read("train")

    @cached_property
    def validating(self) -> set[Any]:
        """Groups of the training files that validate; none where validation has files of its own."""
        if self.files["val"] is not None:
            return set()
        return set(json.loads(self.kept[SPLIT_FILE])["validation"]) if self.kept else self.choose_validation()

    @cached_property
    def remaining(self) -> list[Example]:
        """Examples of the training files that do not validate."""
        return [example for example in self.given if self.group(example) not in self.validating]

    @cached_property
    def train(self) -> list[Example]:
        """Examples to learn from."""
        return self.remaining

    @cached_property
    def val(self) -> list[Example]:
        """Examples to validate on, all with their pictures."""
        if self.files["val"] is not None:
            return self.whole("val")
        found = [example for example in self.given if self.group(example) in self.validating]
        require_pictures(found)
        return found

    def whole(self, split: str) -> list[Example]:
        """The examples of a split that must not lack a picture."""
        found = self.read(split)
        require_pictures(found)
        return found

    def folders(self, split: str) -> PictureFolders:
        """The pictures of a split."""
        return PictureFolders([self.data_dir / folder for folder in listed(self.files[split]["images"])])

    def dataset(self, split: str) -> StepDataset | EvalBatches:
        place = {"seed": self.seed, "rank": distributed.rank(), "world": distributed.world_size()}
        transform = self.transform(train=split == "train")
        if split == "train":
            streams = {"examples": (self.train, self.batch_size, transform)}
            return StepDataset(streams, partial(_collate_step, self.collate), accumulate=self.accumulate, **place)
        source = self.val if split == "val" else self.whole(split)
        return eval_batches(source, transform, self.batch_size, self.collate, **place)

    def recorded(self) -> dict[str, str]:
        """Which groups of the training files validate, and how many examples train and validate."""
        return {SPLIT_FILE: split_text(self.validating, len(self.train), len(self.val))}

    def restore(self, files: Mapping[str, str]) -> None:
        self.kept = files

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """``batch`` on ``device``, pictures in [-1, 1]."""
        return batch.prepared(device)


class PairTask(AnnotatedTask):
    """A task on pictures with texts; its batches are :class:`~.pair_batch.PairBatch`.

    Args:
        inputs: sizes that the encoder expects.
        max_text_len, text_tokenizer, augment: fields of the ``task`` section.
        others: see :class:`AnnotatedTask`.

    Raises:
        ConfigError: the encoder lacks a branch, text positions, or rows of the text embedding.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        max_text_len: int,
        text_tokenizer: Mapping[str, Any],
        augment: Mapping[str, Any],
        **others: Any,
    ) -> None:
        super().__init__(inputs, **others)
        self.max_text_len, self.augment = max_text_len, augment
        if set(inputs.modalities) != {"image", "text"}:
            raise ConfigError(f"encoder.modalities: {list(inputs.modalities)} (this task needs image and text)")
        if max_text_len > inputs.max_text_len:
            what = f"{max_text_len} with encoder.max_text_len {inputs.max_text_len}"
            raise ConfigError(f"task.max_text_len: {what} (lower it)")
        self.tokenizer = create_text_tokenizer(**text_tokenizer)
        if self.tokenizer.vocab_size > inputs.vocab_size:
            what = f"{inputs.vocab_size} rows for a tokenizer of {self.tokenizer.vocab_size} pieces"
            raise ConfigError(f"encoder.vocab_size: {what} (set it to {self.tokenizer.vocab_size})")

    def image_transform(self, *, train: bool) -> ImageTransform:
        """What becomes of a picture."""
        return ImageTransform(self.inputs.img_size, train=train, whole=True, **self.augment)


def split_text(validating: Iterable[Any], train: int | None, val: int | None) -> str:
    """What a run records of its split: the groups that validate, and how many examples train and validate (none where
    that is not known)."""
    split = {"validation": sorted(validating), "training_examples": train, "validation_examples": val}
    return json.dumps(split, indent=0) + "\n"


def listed(value: str | Iterable[str] | None) -> list[str]:
    """One path or several, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _collate_step(collate: Callable[[list[Any]], Batch], streams: Mapping[str, list[Any]]) -> Batch:
    return collate(streams["examples"])
