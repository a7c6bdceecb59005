"""Masked prediction on images, texts and image-text pairs: the pre-training task.

One objective on three streams, each of which may be absent (BEiT-3, sections 2.2 and 2.3): block-wise masked
patches are predicted as codes of a frozen visual tokenizer, masked text pieces as themselves. In pairs more text is
masked than in texts alone, so that the picture has to be read. A masked piece is always replaced by the mask token:
the papers do not say whether they keep or exchange some, as BERT does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from .. import distributed
from ..data.loader import StepDataset, StreamedShards, draw, eval_batches, open_shards
from ..data.sample import BadSample, Sample
from ..data.shards import ShardSet, expand_shards
from ..data.text import create_text_tokenizer
from ..data.transforms import ImageTransform
from ..errors import ConfigError, DataError
from ..models.encoder import Encoder
from ..models.visual_tokenizer import load_visual_tokenizer
from .base import InputSpec, ModelOutput, Record, Task
from .encoder_model import EncoderModel
from .masked_batch import STREAMS, TERMS, MaskedBatch, MaskedExamples, collate, per_sample

UNIGRAM_SMOOTHING = 0.01
"""Added to every count of the unigram baseline: enough for pieces never seen, too little to blur the frequencies."""


class MaskedModelingModel(EncoderModel):
    """Encoder with a text head and an image head that read masked positions only.

    ``mlm_head`` scores text pieces, ``mim_head`` scores visual codes; both are one biased linear layer and carry the
    names of the published checkpoints. Leaving the other positions out of a head with 64,010 outputs saves most of
    its cost.

    Args:
        encoder: gives features for images and texts.
        num_codes: entries of the visual codebook; none when no stream has pictures.
    """

    def __init__(self, encoder: Encoder, *, num_codes: int | None) -> None:
        super().__init__(encoder)
        if "text" in encoder.modalities:
            self.mlm_head = _head(encoder.embed_dim, encoder.vocab_size)
        if num_codes is not None:
            self.mim_head = _head(encoder.embed_dim, num_codes)

    def forward(self, batch: MaskedBatch) -> ModelOutput:
        """``image_logits (M, num_codes)`` and ``text_logits (M', vocab_size)`` at the masked positions."""
        features = self.encoder(
            batch.images,
            batch.text,
            text_padding=batch.text_padding,
            image_mask=batch.image_mask,
            num_pairs=batch.num_pairs,
        )
        logits = {}
        if batch.images is not None:
            patches = features.image[:, 1:].flatten(0, 1)
            logits["image_logits"] = self.mim_head(patches.index_select(0, batch.image_positions))
        if batch.text is not None:
            logits["text_logits"] = self.mlm_head(features.text.flatten(0, 1).index_select(0, batch.text_positions))
        return self.output(logits, features)


def _head(dim: int, num_outputs: int) -> nn.Linear:
    head = nn.Linear(dim, num_outputs)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


class MaskedModeling(Task):
    """The pre-training task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        seed: of data order, crops and masks.
        accumulate: parts that a step's batch is split into.
        others: the fields of the ``task`` section, in plain values.

    Raises:
        ConfigError: no stream is given, sizes do not fit together, or shards are not found.
    """

    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        inputs: InputSpec,
        *,
        seed: int,
        accumulate: int,
        visual_tokenizer: str | None,
        data_dir: str,
        images: Mapping[str, Any] | None,
        texts: Mapping[str, Any] | None,
        pairs: Mapping[str, Any] | None,
        text_tokenizer: Mapping[str, Any],
        augment: Mapping[str, Any],
        image_mask_ratio: float,
        text_mask_ratio: float,
        pair_text_mask_ratio: float,
        min_mask_block: int,
        unigram_samples: int,
    ) -> None:
        self.inputs, self.seed, self.accumulate, self.data_dir = inputs, seed, accumulate, data_dir
        self.streams = {name: given for name, given in zip(STREAMS, (images, texts, pairs), strict=True) if given}
        if not self.streams:
            raise ConfigError("task: no data (set task.images, task.texts or task.pairs)")
        self._check_branches()
        self.unigram_samples = unigram_samples
        self.text_mask_ratio = {"texts": text_mask_ratio, "pairs": pair_text_mask_ratio}
        self.grid = (inputs.img_size[0] // inputs.patch_size, inputs.img_size[1] // inputs.patch_size)
        num_patches = math.prod(self.grid)
        self.num_masked = round(image_mask_ratio * num_patches)
        self.min_block = max(1, round(min_mask_block * num_patches / 196))
        self.tokenizer = create_text_tokenizer(**text_tokenizer)
        if self.tokenizer.vocab_size > inputs.vocab_size:
            raise ConfigError(
                f"encoder.vocab_size: {inputs.vocab_size} rows for a tokenizer of {self.tokenizer.vocab_size} pieces"
                f" (set it to {self.tokenizer.vocab_size})"
            )
        self.visual_tokenizer = None
        second_size = None
        if "images" in self.streams or "pairs" in self.streams:
            self.visual_tokenizer = self._load_visual_tokenizer(visual_tokenizer)
            second_size = self.visual_tokenizer.img_size
        self.train_pictures = ImageTransform(inputs.img_size, second_size=second_size, train=True, **augment)
        self.val_pictures = ImageTransform(inputs.img_size, second_size=second_size, train=False)
        self.collate = partial(collate, pad_id=self.tokenizer.pad_id, mask_id=self.tokenizer.mask_id)
        for name in self.streams:
            self._source(name, "train")
            self._source(name, "val")

    def _check_branches(self) -> None:
        needed = {"images": {"image"}, "texts": {"text"}, "pairs": {"image", "text"}}
        for name in self.streams:
            missing = needed[name] - set(self.inputs.modalities)
            if missing:
                raise ConfigError(
                    f"task.{name}: needs the {' and '.join(sorted(missing))} branch, encoder.modalities is"
                    f" {list(self.inputs.modalities)} (build the branch or leave the stream out)"
                )

    def _load_visual_tokenizer(self, path: str | None) -> nn.Module:
        if path is None:
            raise ConfigError(
                "task.visual_tokenizer: not set, but a stream has pictures"
                " (train one with tools/train_visual_tokenizer.py and name its run folder)"
            )
        tokenizer = load_visual_tokenizer(path).eval().requires_grad_(False)
        side = tokenizer.img_size // tokenizer.patch_size
        if self.grid != (side, side):
            raise ConfigError(
                f"task.visual_tokenizer: {path} codes {side} x {side} patches, the encoder sees"
                f" {self.grid[0]} x {self.grid[1]} (choose encoder.img_size and encoder.patch_size to match)"
            )
        return tokenizer

    # ------------------------------------------------------------------------------------------ data
    @cache  # noqa: B019 (a task lives as long as its run)
    def _source(self, stream: str, split: str) -> ShardSet | StreamedShards | None:
        shards = self.streams[stream][split]
        return open_shards(expand_shards(shards, self.data_dir)) if shards else None

    def dataset(self, split: str) -> StepDataset | Sequence[MaskedBatch]:
        """Training batches by step, or this rank's share of the validation batches, stream by stream."""
        rank, world = distributed.rank(), distributed.world_size()
        if split == "train":
            streams = {
                name: (self._source(name, "train"), given["batch_size"], self._examples(name, train=True))
                for name, given in self.streams.items()
            }
            return StepDataset(
                streams, self.collate, seed=self.seed, accumulate=self.accumulate, rank=rank, world=world
            )
        parts = [
            eval_batches(
                self._source(name, "val"),
                self._examples(name, train=False),
                given["batch_size"],
                partial(self._collate_one, name),
                rank=rank,
                world=world,
            )
            for name, given in self.streams.items()
            if given["val"]
        ]
        return ConcatDataset(parts) if parts else []

    def _collate_one(self, stream: str, examples: list[dict[str, Any]]) -> MaskedBatch:
        return self.collate({stream: examples})

    def _examples(self, stream: str, *, train: bool) -> MaskedExamples:
        return MaskedExamples(
            stream,
            self.tokenizer,
            self.inputs.max_text_len,
            self.train_pictures if train else self.val_pictures,
            self.grid,
            self.num_masked,
            self.min_block,
            self.text_mask_ratio.get(stream, 0.0),
            train,
        )

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> MaskedModelingModel:
        return MaskedModelingModel(encoder, num_codes=self.visual_tokenizer and self.visual_tokenizer.num_codes)

    def prepare(self, batch: MaskedBatch, device: torch.device) -> MaskedBatch:
        """``batch`` on ``device``, pictures in [-1, 1], codes looked up by the frozen tokenizer."""
        moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        if batch.images is not None:
            tokenizer = self.visual_tokenizer.to(device)
            with torch.no_grad():
                codes = tokenizer.tokenize(moved.pop("tokenizer_images").float() / 255)
            moved["image_targets"] = codes.flatten().index_select(0, moved["image_positions"])
            moved["images"] = moved["images"].float() / 127.5 - 1
        return replace(batch, **moved)

    def num_targets(self, batch: MaskedBatch) -> dict[str, int]:
        return {term: len(batch.samples.get(term, ())) for term in self.terms}

    def loss(self, output: ModelOutput, batch: MaskedBatch) -> dict[str, Tensor]:
        """Cross-entropy of each of :data:`TERMS`, summed over its masked positions."""
        kinds = {kind for _, kind, _ in batch.terms()}
        rows = {
            kind: F.cross_entropy(
                output.values[f"{kind}_logits"].float(), getattr(batch, f"{kind}_targets"), reduction="none"
            )
            for kind in kinds
        }
        return {term: rows[kind][chosen].sum() for term, kind, chosen in batch.terms()}

    # ------------------------------------------------------------------------------------ evaluation
    def predict(self, model: nn.Module, batch: MaskedBatch) -> list[Record]:
        """Per sample and term: summed loss in nats, right predictions, masked positions."""
        output = model(batch)
        results = {}
        for term, kind, chosen in batch.terms():
            logits, targets = output.values[f"{kind}_logits"][chosen], getattr(batch, f"{kind}_targets")[chosen]
            loss = F.cross_entropy(logits.float(), targets, reduction="none")
            results[term] = (loss, logits.argmax(-1) == targets)
        return per_sample(batch, results)

    def score(self, records: list[Record]) -> dict[str, float]:
        """Perplexity and accuracy of each term; ``perplexity`` is the exponent of the terms' mean loss."""
        totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
        for record in records:
            for term, sums in record["terms"].items():
                totals[term] += sums
        present = [term for term, _, _ in TERMS if term in totals]
        if not present:
            return {}
        losses = {term: totals[term][0] / totals[term][2] for term in present}
        scores = {f"perplexity/{term}": math.exp(loss) for term, loss in losses.items()}
        scores |= {f"accuracy/{term}": totals[term][1] / totals[term][2] for term in present}
        scores["perplexity"] = math.exp(sum(losses.values()) / len(losses))
        scores["accuracy"] = sum(totals[term][1] for term in present) / sum(totals[term][2] for term in present)
        return scores

    def baselines(self, device: torch.device) -> dict[str, float]:
        """Perplexities of guessing by frequency alone: of codes and of pieces in the training data, at the masked
        validation positions."""
        frequencies = {term: self._log_frequencies(term, device) for term in self.terms}
        records: list[Record] = []
        for batch in self.dataset("val"):
            batch = self.prepare(batch, device)
            results = {}
            for term, kind, chosen in batch.terms():
                targets, scores = getattr(batch, f"{kind}_targets")[chosen], frequencies[term]
                results[term] = (-scores[targets], targets == scores.argmax())
            records += per_sample(batch, results)
        return self.score(distributed.gather_records(records))

    @property
    def terms(self) -> list[str]:
        """The terms of the streams that are given."""
        return [term for term, stream, _ in TERMS if stream in self.streams]

    def _log_frequencies(self, term: str, device: torch.device) -> Tensor:
        """Logarithm of the share of each code or piece in the first training samples."""
        is_text = term in ("texts", "pairs_text")
        size = self.tokenizer.vocab_size if is_text else self.visual_tokenizer.num_codes
        found = []
        for sample in self._first_samples(term.split("_")[0]):
            with suppress(BadSample):
                found.append(self._pieces(sample) if is_text else self._codes(sample, device))
        if not found:
            raise DataError(f"task.{term.split('_')[0]}.train: no sample can be read (run mhmoe-vl check-data)")
        counts = torch.bincount(torch.cat(found), minlength=size).double() + UNIGRAM_SMOOTHING
        return (counts / counts.sum()).log().float().to(device)

    def _first_samples(self, stream: str) -> Iterator[Sample]:
        """The first samples of the training order: every sample of a small set, a fair draw of a large one."""
        source, count = self._source(stream, "train"), self.unigram_samples
        for position in range(count if isinstance(source, StreamedShards) else min(len(source), count)):
            _, _, sample = draw(source, self.seed, position)
            if isinstance(sample, Sample):
                yield sample

    def _pieces(self, sample: Sample) -> Tensor:
        special = self.tokenizer.special_ids
        pieces = [i for text in sample.captions() for i in self.tokenizer.encode(text) if i not in special]
        return torch.tensor(pieces, dtype=torch.int64)

    def _codes(self, sample: Sample, device: torch.device) -> Tensor:
        _, picture = self.val_pictures(sample.image(), np.random.default_rng(0))
        return self.visual_tokenizer.to(device).tokenize(picture[None].to(device).float() / 255).flatten().cpu()
