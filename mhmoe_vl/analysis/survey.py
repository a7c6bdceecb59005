"""A model over a data set, in one pass: where all its tokens go."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..data.loader import Source, eval_batches, step_loader
from ..data.sample import IMAGE_EXTENSIONS, Sample
from ..data.text import pad
from ..data.transforms import ImageTransform
from .activation import Activation
from .labels import COLOURS, Labels, patch_colours, token_words
from .token_sample import LABEL
from .trace import trace_routing
from .trained import TrainedModel


# ------------------------------------------------------------------------------------------- batches
class _Example(NamedTuple):
    sample: int
    class_name: str
    image: Tensor | None
    colours: np.ndarray | None
    ids: list[int]
    words: list[str]


class _Batch(NamedTuple):
    image: Tensor | None
    text: Tensor | None
    text_padding: Tensor | None
    num_pairs: int | None
    labels: Labels


class _Examples:
    """From a raw sample to what the model reads of it: picture, first caption, or both; picklable for data workers."""

    def __init__(self, model: TrainedModel) -> None:
        self.modalities, self.patch_size = model.encoder.modalities, model.encoder.patch_size
        self.pictures = ImageTransform(model.encoder.img_size, train=False)
        self.tokenizer, self.max_text_len = model.tokenizer, model.encoder.max_text_len

    def __call__(self, sample: Sample, rng: np.random.Generator) -> _Example:
        image, colours, ids, words = None, None, [], []
        has_image = any(extension in sample.members for extension in IMAGE_EXTENSIONS)
        described = sample.json() if "json" in sample.members else None
        has_text = "txt" in sample.members or (isinstance(described, dict) and "captions" in described)
        if "image" in self.modalities and has_image:
            image = self.pictures(sample.image(), rng)
            colours = patch_colours(image, self.patch_size)
        if "text" in self.modalities and has_text:
            ids = self.tokenizer.encode(sample.captions()[0], self.max_text_len)
            words = token_words(self.tokenizer, ids)
        if image is None and not ids:
            raise sample.bad("nothing to read", f"no {' or '.join(self.modalities)}, which is what the model reads")
        return _Example(sample.index, _class_of(sample, described), image, colours, ids, words)


def _class_of(sample: Sample, described: Any) -> str:
    """``class`` of the json member, else the cls member, else nothing."""
    named = described.get("class") if isinstance(described, dict) else None
    if isinstance(named, str | int):
        return str(named)
    return sample.text("cls") if "cls" in sample.members else ""


def _collate(examples: list[_Example], pad_id: int) -> _Batch:
    """Pictures alone, texts alone, and pairs last, as the encoder wants them."""
    pairs = [e for e in examples if e.image is not None and e.ids]
    pictures = [e for e in examples if not e.ids] + pairs
    texts = [e for e in examples if e.image is None] + pairs
    ids, padding = pad([e.ids for e in texts], pad_id)
    words = np.full(ids.shape, "", LABEL)
    for row, example in zip(words, texts, strict=True):
        row[: len(example.words)] = example.words
    codes = np.stack([e.colours for e in pictures]) if pictures else np.zeros((0, 0), np.int8)
    labels = Labels(
        image_samples=np.array([e.sample for e in pictures], np.int64),
        text_samples=np.array([e.sample for e in texts], np.int64),
        image_classes=np.array([e.class_name for e in pictures], LABEL),
        text_classes=np.array([e.class_name for e in texts], LABEL),
        colours=np.array(COLOURS)[codes],
        words=words,
    )
    return _Batch(
        torch.stack([e.image for e in pictures]) if pictures else None,
        ids if texts else None,
        padding if texts else None,
        len(pairs) if pictures and texts else None,
        labels,
    )


# ---------------------------------------------------------------------------------------------- pass
def survey(
    model: TrainedModel,
    source: Source,
    *,
    words: Collection[str] = (),
    capacity_factor: float | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Activation:
    """The activation of a model's experts over all samples of ``source``, the same on every rank.

    Each sample is read as evaluation does: the largest centred crop, the first caption (cut at its end where it is
    longer than the model takes). The encoder runs in float64, where rounding does not decide what is chosen: the counts
    are the same for any batch size and number of processes.

    Args:
        model: from :func:`load_model`; its encoder comes back in float64.
        source: samples with an index (:func:`~mhmoe_vl.data.loader.open_shards`).
        words: listed words whose divergence is counted apart.
        capacity_factor: count what the training rule would drop if every sample were a batch of its own.
        batch_size: samples at a time; one, where a capacity is given.
        num_workers: processes that prepare samples.
        device: to compute on.

    Raises:
        ConfigError: a dense encoder, or a source without an index.
        BadSample: a sample cannot be read or holds nothing that the model reads.
    """
    activation = Activation.of(model.encoder, words)
    batches = eval_batches(
        source,
        _Examples(model),
        batch_size if capacity_factor is None else 1,
        partial(_collate, pad_id=model.tokenizer.pad_id if model.tokenizer else 0),
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    encoder = model.encoder.to(device, torch.float64).eval()
    not_main = not distributed.is_main()
    shown = tqdm(total=batches.num_samples, desc=model.name, unit="sample", disable=not_main or None)
    with shown, distributed.independent():
        for batch in step_loader(batches, 0, len(batches), num_workers):
            trace = trace_routing(
                encoder,
                None if batch.image is None else batch.image.to(device, torch.float64) / 127.5 - 1,
                None if batch.text is None else batch.text.to(device),
                text_padding=None if batch.text is None else batch.text_padding.to(device),
                num_pairs=batch.num_pairs,
                capacity_factor=capacity_factor,
            )
            activation.add(trace, batch.labels)
            samples = np.union1d(batch.labels.image_samples, batch.labels.text_samples)
            shown.update(len(samples) * distributed.world_size())
    total = Activation.of(encoder, words)
    for part in distributed.gather_bytes(activation.to_bytes()):
        total.add_bytes(part)
    return total
