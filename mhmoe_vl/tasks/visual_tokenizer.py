"""Training of the visual tokenizer (VQ-KD, BEiT v2): patches as codes that tell what a teacher sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..data.loader import StepDataset, eval_batches, open_shards
from ..data.sample import Sample
from ..data.shards import ShardSet, expand_shards
from ..data.transforms import ImageTransform
from ..errors import ConfigError
from ..models.teachers import create_teacher
from ..models.visual_tokenizer import VisualTokenizer
from .base import InputSpec, ModelOutput, Record, Task


@dataclass(frozen=True)
class PictureBatch:
    """Pictures and what the teacher says about them.

    Attributes:
        images: ``(B, 3, H, W)`` uint8, after ``prepare`` float in [0, 1].
        ids: one a picture.
        targets: ``(B, P, target_dim)``; filled by ``prepare``.
        bad: samples left out, by reason.
    """

    images: Tensor
    ids: list[str]
    targets: Tensor | None = None
    bad: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class VisualTokenizerModel(nn.Module):
    """The tokenizer as the engine trains it, under the name ``tokenizer``."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: PictureBatch) -> ModelOutput:
        """``tokens``, ``reconstruction`` and ``commitment_loss`` of the batch's pictures."""
        return ModelOutput(self.tokenizer(batch.images)._asdict(), {}, {})


class VisualTokenizerTask(Task):
    """Distillation of a teacher's patch features through codes.

    Args:
        inputs: unused; a tokenizer's sizes stand in ``model``.
        seed: of data order and crops.
        accumulate: parts that a step's batch is split into; each part moves the codebook once.
        others: the fields of the ``task`` section, in plain values.

    Raises:
        ConfigError: sizes do not fit together, the teacher cannot be made, or shards are not found.
    """

    metric = "reconstruction_loss"
    higher_is_better = False

    def __init__(
        self,
        inputs: InputSpec | None = None,
        *,
        seed: int,
        accumulate: int,
        model: Mapping[str, Any],
        teacher: Mapping[str, Any],
        data_dir: str,
        images: Mapping[str, Any],
        augment: Mapping[str, Any],
    ) -> None:
        self.seed, self.accumulate, self.sizes, self.batch_size = seed, accumulate, model, images["batch_size"]
        self.num_patches = (model["img_size"] // model["patch_size"]) ** 2
        self.teacher = create_teacher(model["img_size"], patch_size=model["patch_size"], **teacher)
        if self.teacher.target_dim != model["target_dim"]:
            raise ConfigError(
                f"task.model.target_dim: {model['target_dim']}, but the teacher's features are"
                f" {self.teacher.target_dim} wide (set it to {self.teacher.target_dim})"
            )
        train, val = ImageTransform(model["img_size"], train=True, **augment), ImageTransform(model["img_size"])
        self.examples = {"train": _Example(train), "val": _Example(val)}
        self.collate = _Collate(model["img_size"])
        self.train_source = open_shards(expand_shards(images["train"], data_dir))
        self.val_source = ShardSet(expand_shards(images["val"], data_dir)) if images["val"] else None

    def dataset(self, split: str) -> StepDataset | Iterable[PictureBatch]:
        """Training batches by step, or this rank's share of the validation batches."""
        place = {"rank": distributed.rank(), "world": distributed.world_size()}
        example = self.examples[split]
        if split == "train":
            streams = {"images": (self.train_source, self.batch_size, example)}
            return StepDataset(streams, self.collate.step, seed=self.seed, accumulate=self.accumulate, **place)
        if self.val_source is None:
            return []
        return eval_batches(self.val_source, example, self.batch_size, self.collate, seed=self.seed, **place)

    def model(self, encoder: nn.Module | None = None) -> VisualTokenizerModel:
        """A new tokenizer; it has its own encoder."""
        return VisualTokenizerModel(VisualTokenizer(**self.sizes))

    def prepare(self, batch: PictureBatch, device: torch.device) -> PictureBatch:
        """``batch`` on ``device``, pictures in [0, 1], with the teacher's features."""
        images = batch.images.to(device).float() / 255
        return replace(batch, images=images, targets=self.teacher.to(device)(images))

    def num_targets(self, batch: PictureBatch) -> dict[str, int]:
        """Patches, for both terms."""
        patches = len(batch) * self.num_patches
        return {"reconstruction": patches, "commitment": patches}

    def loss(self, output: ModelOutput, batch: PictureBatch) -> dict[str, Tensor]:
        """The teacher's error and the commitment loss, summed over patches."""
        error = self.teacher.error(output.values["reconstruction"], batch.targets)
        return {"reconstruction": error.sum(), "commitment": output.values["commitment_loss"].sum()}

    def predict(self, model: nn.Module, batch: PictureBatch) -> list[Record]:
        """Per picture: mean error over its patches, and its codes row by row."""
        output = model(batch)
        errors = self.teacher.error(output.values["reconstruction"], batch.targets).mean(1).tolist()
        codes = output.values["tokens"].tolist()
        return [{"id": i, "loss": e, "codes": c} for i, e, c in zip(batch.ids, errors, codes, strict=True)]

    def score(self, records: list[Record]) -> dict[str, float]:
        """``reconstruction_loss``; ``codebook_usage``, share of codes that occur; ``code_perplexity``, exponent of the
        entropy of the codes' frequencies (``num_codes`` when all are equally frequent)."""
        if not records:
            return {}
        counts = np.bincount(np.concatenate([r["codes"] for r in records]), minlength=self.sizes["num_codes"])
        shares = counts[counts > 0] / counts.sum()
        return {
            "reconstruction_loss": float(np.mean([r["loss"] for r in records])),
            "codebook_usage": len(shares) / len(counts),
            "code_perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        }

    def baselines(self, device: torch.device) -> dict[str, float]:
        """``reconstruction_loss`` of one answer for all patches: the mean of the validation targets."""
        if self.val_source is None:
            return {}
        width = self.teacher.target_dim
        mean = self._mean_over_patches(lambda targets: targets, width, device)
        error = self._mean_over_patches(lambda t: self.teacher.error(mean.expand_as(t), t)[..., None], 1, device)
        return {"reconstruction_loss": error.item()}

    def _mean_over_patches(self, values: Callable[[Tensor], Tensor], width: int, device: torch.device) -> Tensor:
        """Mean of ``values(targets)`` (B, P, width) over all validation patches of all ranks, (width,) float64."""
        total = torch.zeros(width, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        for batch in self.dataset("val"):
            found = values(self.prepare(batch, device).targets).double().flatten(0, 1)
            total, count = total + found.sum(0), count + len(found)
        return distributed.all_reduce_sum(total) / distributed.all_reduce_sum(count)


class _Example:
    """From a raw sample to an example; a class, so that data workers can be sent it."""

    def __init__(self, pictures: ImageTransform) -> None:
        self.pictures = pictures

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[str, Tensor]:
        return f"{sample.index:09d}", self.pictures(sample.image(), rng)


class _Collate:
    """Examples to a batch, which may be empty."""

    def __init__(self, img_size: int) -> None:
        self.img_size = img_size

    def __call__(self, examples: list[tuple[str, Tensor]]) -> PictureBatch:
        images = torch.empty(len(examples), 3, self.img_size, self.img_size, dtype=torch.uint8)
        for row, (_, image) in zip(images, examples, strict=True):
            row.copy_(image)
        return PictureBatch(images, [identity for identity, _ in examples])

    def step(self, streams: Mapping[str, list[tuple[str, Tensor]]]) -> PictureBatch:
        """The batch of the one stream of a training step."""
        return self(streams["images"])
