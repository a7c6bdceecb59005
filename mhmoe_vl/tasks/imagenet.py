"""Classification of pictures: ImageNet in class folders or shards, and anything in the same layout.

As BEiT-3 does it: the picture passes the encoder's image branch alone, and the mean of its patch tokens, normalised,
is scored against every class. Mixup and CutMix mix neighbours (see :mod:`..data.mixing`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import distributed
from ..data.annotated import Example, held_out
from ..data.labelled import (
    Chosen,
    ImageFolder,
    class_folders,
    class_root,
    label_in_shard,
    open_labelled,
    read_classes,
    sample_keys,
)
from ..data.loader import EvalBatches, Source, StepDataset, StreamedShards, eval_batches
from ..data.mixing import Mix, MixedSteps, Mixing
from ..data.sample import Sample
from ..data.shards import expand_shards
from ..data.transforms import ImageTransform
from ..errors import ConfigError
from ..models.classifier import ImageClassifier
from ..models.encoder import Encoder
from ..models.heads import ClassNames
from .annotated_task import SPLIT_FILE, split_text
from .base import InputSpec, ModelOutput, Record, Task
from .encoder_model import model_output

NUM_CANDIDATES = 5
CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class LabelledBatch:
    """Pictures with their classes.

    Attributes:
        images: ``(B, 3, H, W)`` uint8, after ``prepare`` normalised float and mixed.
        labels: ``(B,)`` class numbers.
        mates: ``(B,)`` row that each is mixed with, its own where it stays as it is.
        records: what is known of each picture.
        mix: of the step, none where nothing is mixed.
        bad: pictures left out, by reason.
    """

    images: Tensor
    labels: Tensor
    mates: Tensor
    records: list[Record]
    mix: Mix | None = None
    bad: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)


class ImageNetModel(ImageClassifier):
    """The classifier as the engine trains it, with the names of its classes.

    Args:
        encoder: with an image branch; without final norm in the published form.
        classes: names in the order of their numbers.
    """

    find_unused_parameters = True  # the mask token, and branches beside that of images

    def __init__(self, encoder: Encoder, classes: Sequence[str]) -> None:
        super().__init__(encoder, num_classes=len(classes))
        self.classes = ClassNames(classes)

    def forward(self, batch: LabelledBatch) -> ModelOutput:
        """``logits (B, C)``."""
        features = self.encoder(batch.images)
        return model_output({"logits": self.forward_head(features.image)}, self.encoder, features)


class ImageNet(Task):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        seed: of data order, augmentation, mixing and the validation split.
        accumulate: parts that a step's batch is split into.
        others: the fields of the ``task`` section, in plain values.

    Raises:
        ConfigError: the encoder has no image branch, or an option does not fit another one.
    """

    metric = "top1"
    higher_is_better = True

    def __init__(
        self,
        inputs: InputSpec,
        *,
        seed: int,
        accumulate: int,
        data_dir: str,
        train: str | Sequence[str],
        val: str | Sequence[str] | None,
        val_fraction: float,
        classes: str | int | None,
        batch_size: int,
        label_smoothing: float,
        mixup: float,
        cutmix: float,
        mix_prob: float,
        mix_switch_prob: float,
        test_size: int | tuple[int, int] | None,
        crop_pct: float,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        augment: Mapping[str, Any],
    ) -> None:
        self.inputs, self.seed, self.accumulate = inputs, seed, accumulate
        self.data_dir, self.places, self.given_classes = Path(data_dir), {"train": train, "val": val}, classes
        self.val_fraction, self.batch_size, self.label_smoothing = val_fraction, batch_size, label_smoothing
        self.mixing = Mixing(mixup, cutmix, mix_prob, mix_switch_prob) if mixup or cutmix else None
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.kept: Mapping[str, str] = {}
        if "image" not in inputs.modalities:
            raise ConfigError(f"encoder.modalities: {list(inputs.modalities)} (this task needs image)")
        test_size = inputs.img_size if test_size is None else test_size
        self.test_size = (test_size, test_size) if isinstance(test_size, int) else tuple(test_size)
        if any(side % inputs.patch_size for side in self.test_size):
            what = f"{list(self.test_size)} with encoder.patch_size {inputs.patch_size}"
            raise ConfigError(f"task.test_size: {what} (choose multiples)")
        self.pictures = {
            "train": ImageTransform(inputs.img_size, train=True, **augment),
            "val": ImageTransform(self.test_size, crop_pct=crop_pct),
        }

    # ------------------------------------------------------------------------------------------ data
    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes: the run's own, a given list, numbers, or the sorted folders of train.

        Raises:
            ConfigError: nothing says what the classes of shards are.
        """
        if self.kept:
            return json.loads(self.kept[CLASSES_FILE])
        if isinstance(self.given_classes, int):
            return list(map(str, range(self.given_classes)))
        if self.given_classes is not None:
            return read_classes(self.data_dir / self.given_classes)
        folder = class_root(self.places["train"], self.data_dir)
        if folder is None:
            expand_shards(self.places["train"], self.data_dir)  # which says so when there are none
            what = "not set, and shards do not name their classes"
            raise ConfigError(f"task.classes: {what} (give the classes.json that they were packed with, or a number)")
        return class_folders(folder)

    @cached_property
    def given(self) -> Source:
        """All pictures of the training files."""
        return open_labelled(self.places["train"], self.data_dir, self.classes)

    @cached_property
    def validating(self) -> set[Any]:
        """Keys of the training pictures that validate; none where validation has files of its own."""
        if self.places["val"] is not None:
            return set()
        if self.kept:
            return set(json.loads(self.kept[SPLIT_FILE])["validation"])
        if isinstance(self.given, StreamedShards):
            raise ConfigError("task.val: not set, and nothing can be held out of streamed shards (make a manifest)")
        return held_out(sample_keys(self.given), seed=self.seed, fraction=self.val_fraction)

    def _chosen(self, *, validating: bool) -> Source:
        keys = sample_keys(self.given)
        return Chosen(self.given, [n for n, key in enumerate(keys) if (key in self.validating) == validating])

    @cached_property
    def train(self) -> Source:
        """Pictures to learn from."""
        return self._chosen(validating=False) if self.validating else self.given

    @cached_property
    def val(self) -> Source:
        """Pictures to validate on."""
        if self.places["val"] is not None:
            return open_labelled(self.places["val"], self.data_dir, self.classes)
        return self._chosen(validating=True)

    def dataset(self, split: str) -> StepDataset | EvalBatches:
        place = {"seed": self.seed, "rank": distributed.rank(), "world": distributed.world_size()}
        transform = _Examples(self.pictures[split], self.classes)
        if split == "val":
            return eval_batches(self.val, transform, self.batch_size, partial(_collate, size=self.test_size), **place)
        streams = {"pictures": (self.train, self.batch_size, transform)}
        collate = partial(_collate_step, size=self.inputs.img_size)
        place["accumulate"] = self.accumulate
        if self.mixing is None:
            return StepDataset(streams, collate, **place)
        return MixedSteps(streams, collate, mixing=self.mixing, img_size=self.inputs.img_size, **place)

    def prepare(self, batch: LabelledBatch, device: torch.device) -> LabelledBatch:
        """``batch`` on ``device``, pictures normalised and mixed."""
        images = (batch.images.to(device).float() / 255 - self.mean.to(device)) / self.std.to(device)
        labels, mates = batch.labels.to(device), batch.mates.to(device)
        if batch.mix is not None:
            images = batch.mix.pictures(images, mates)
        return replace(batch, images=images, labels=labels, mates=mates)

    def recorded(self) -> dict[str, str]:
        """The list of classes, and which pictures of the training files validate."""
        counts = [None if isinstance(source, StreamedShards) else len(source) for source in (self.train, self.val)]
        return {
            CLASSES_FILE: json.dumps(self.classes, indent=0, ensure_ascii=False) + "\n",
            SPLIT_FILE: split_text(self.validating, *counts),
        }

    def restore(self, files: Mapping[str, str]) -> None:
        self.kept = files

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> ImageNetModel:
        return ImageNetModel(encoder, self.classes)

    def num_targets(self, batch: LabelledBatch) -> dict[str, int]:
        """Pictures."""
        return {"class": len(batch)}

    def loss(self, output: ModelOutput, batch: LabelledBatch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed targets, that of a picture and of its mate by their shares, summed."""
        logits = output.values["logits"].float()
        entropy = partial(F.cross_entropy, reduction="none", label_smoothing=self.label_smoothing)
        own = entropy(logits, batch.labels)
        if batch.mix is None or batch.mix.share == 1:
            return {"class": own.sum()}
        others = entropy(logits, batch.labels[batch.mates])
        return {"class": torch.lerp(others, own, batch.mix.share).sum()}

    # ------------------------------------------------------------------------------------ evaluation
    def predict(self, model: nn.Module, batch: LabelledBatch) -> list[Record]:
        """Per picture: the class, and the five best with their probabilities."""
        probabilities = model(batch).values["logits"].float().softmax(-1)
        best = probabilities.topk(min(NUM_CANDIDATES, len(self.classes)))
        found = []
        for record, values, numbers in zip(batch.records, best.values.tolist(), best.indices.tolist(), strict=True):
            names = [self.classes[number] for number in numbers]
            candidates = [list(pair) for pair in zip(names, values, strict=True)]
            found.append({**record, "prediction": names[0], "candidates": candidates})
        return found

    def score(self, records: list[Record]) -> dict[str, float]:
        """``top1`` and ``top5``: percent of the pictures whose class is the first, or among the first five."""
        if not records:
            return {}
        first = [record["label"] == record["prediction"] for record in records]
        among = [any(record["label"] == name for name, _ in record["candidates"]) for record in records]
        return {"top1": 100 * float(np.mean(first)), "top5": 100 * float(np.mean(among))}

    def baselines(self, device: torch.device) -> dict[str, float]:
        """Scores of always giving the most frequent classes of the training pictures; none for shards, whose classes
        are known only when they are read."""
        if not isinstance(self.given, ImageFolder):
            return {}
        labels = self.given.labels
        labels = labels[self.train.numbers] if isinstance(self.train, Chosen) else labels
        best = np.argsort(-np.bincount(labels, minlength=len(self.classes)), kind="stable")[:NUM_CANDIDATES]
        candidates = [[self.classes[number], 0.0] for number in best]
        guess = {"prediction": candidates[0][0], "candidates": candidates}
        return self.score([{"label": self.classes[example.record], **guess} for example in self.val])

    def gallery(self, records: list[Record]) -> list[dict[str, Any]]:
        """Pictures with the five best classes as bars."""
        return [
            {
                "images": [self._picture(record)],
                "caption": record["image"] if isinstance(record["id"], int) else record["id"],
                "right": record["prediction"] == record["label"],
                "rows": [["class", record["prediction"]], ["true class", record["label"]]],
                "bars": record["candidates"],
            }
            for record in records
        ]

    def _picture(self, record: Record) -> str | bytes:
        """The path of a validated picture, or its bytes where it lies in a shard."""
        if isinstance(record["id"], str):
            return record["image"]
        return (self.val if self.places["val"] is not None else self.given)[record["id"]].image()

    def submission(self, records: list[Record]) -> dict[str, str]:
        """A table of all pictures: true class, and the five best with their probabilities."""
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        places = range(1, 1 + min(NUM_CANDIDATES, len(self.classes)))
        table.writerow(["id", "label", *(f"{name}{place}" for place in places for name in ("class", "probability"))])
        for record in records:
            table.writerow([record["id"], record["label"], *(v for pair in record["candidates"] for v in pair)])
        return {"imagenet_predictions.csv": file.getvalue()}


@dataclass(frozen=True)
class _Examples:
    """From a picture of a class folder or shard to an example."""

    pictures: ImageTransform
    classes: Sequence[str]

    def __call__(self, sample: Example | Sample, rng: np.random.Generator) -> dict[str, Any]:
        if isinstance(sample, Example):
            number, identity, image = sample.record, sample.key, str(sample.pictures[0])
            data = sample.picture()
        else:
            number, identity = label_in_shard(sample, len(self.classes)), sample.index
            image, data = f"{sample.shard}:{sample.key}", sample.image()
        record = {"id": identity, "image": image, "label": self.classes[number]}
        return {"picture": self.pictures(data, rng), "label": number, "record": record}


def _collate(examples: list[dict[str, Any]], *, size: tuple[int, int]) -> LabelledBatch:
    images = torch.empty(len(examples), 3, *size, dtype=torch.uint8)
    for row, example in zip(images, examples, strict=True):
        row.copy_(example["picture"])
    mates = torch.arange(len(examples))
    paired = mates[[bool(example.get("paired")) for example in examples]]
    mates[paired[::2]], mates[paired[1::2]] = paired[1::2], paired[::2]
    labels = torch.tensor([example["label"] for example in examples], dtype=torch.int64)
    return LabelledBatch(images, labels, mates, [example["record"] for example in examples])


def _collate_step(streams: Mapping[str, list[dict[str, Any]]], *, size: tuple[int, int]) -> LabelledBatch:
    return _collate(streams["pictures"], size=size)
