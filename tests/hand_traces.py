"""Routing traces written by hand."""

from __future__ import annotations

import numpy as np

from mhmoe_vl.analysis.labels import Labels
from mhmoe_vl.analysis.token_sample import LABEL
from mhmoe_vl.analysis.trace import LayerTrace, RoutingTrace, TokenTrace


def tokens(experts, present=None, counted=None, kept=None, entropy=None) -> TokenTrace:
    """``experts`` (B, N, S, K); absent tokens get -1. All present, kept and counted, gates 1 / K, entropy 0.5."""
    experts = np.array(experts, np.int16)
    present = np.ones(experts.shape[:2], bool) if present is None else np.array(present, bool)
    experts[~present] = -1
    return TokenTrace(
        experts=experts,
        gates=np.where(present[..., None, None], 1 / experts.shape[-1], 0) + np.zeros(experts.shape, np.float32),
        kept=np.broadcast_to(present[..., None, None], experts.shape) if kept is None else np.array(kept, bool),
        entropy=np.full(experts.shape[:3], 0.5, np.float32) if entropy is None else np.array(entropy, np.float32),
        present=present,
        counted=present if counted is None else np.array(counted, bool),
    )


def layer(block: int, num_experts: int, pool: str = "joint", **parts: TokenTrace) -> LayerTrace:
    """``parts`` by kind; S and K as theirs."""
    shape = next(iter(parts.values())).experts.shape
    return LayerTrace(block, pool, num_experts, shape[3], shape[2], parts)


def trace(*layers: LayerTrace, grid=None, num_pairs: int = 0) -> RoutingTrace:
    """A trace of some layers; samples are counted from their parts."""
    sizes = {name: part.present.shape[0] for each in layers for name, part in each.parts.items()}
    num_images, num_texts = sizes.get("class", sizes.get("patch", 0)), sizes.get("text", 0)
    return RoutingTrace(layers, grid, num_images, num_texts, num_pairs, (), None)


def labels(colours=(), words=(), classes=(), first: int = 0) -> Labels:
    """Labels of images and texts numbered from ``first``; ``classes`` are those of the images, or else the texts."""
    samples = np.arange(first, first + max(len(colours), len(words)))
    classes = np.array(classes or [""] * len(samples), LABEL)
    return Labels(
        image_samples=samples[: len(colours)],
        text_samples=samples[: len(words)],
        image_classes=classes[: len(colours)],
        text_classes=classes[: len(words)],
        colours=np.array(colours, LABEL).reshape(len(colours), -1 if len(colours) else 0),
        words=np.array(words, LABEL).reshape(len(words), -1 if len(words) else 0),
    )


def random_trace(
    rng: np.random.Generator, *, experts=6, subtokens=2, top_k=2, blocks=(1, 3), images=2, texts=3, length=5
):
    """A trace of a 2 x 2 grid and of texts of different lengths, and its labels."""
    lengths = rng.integers(1, length + 1, texts)
    present = np.arange(length) < lengths[:, None]

    def draw(samples: int, count: int) -> np.ndarray:
        order = rng.random((samples, count, subtokens, experts)).argsort(-1)
        return order[..., :top_k]

    layers = [
        layer(
            block,
            experts,
            **{"class": tokens(draw(images, 1)), "patch": tokens(draw(images, 4))},
            text=tokens(draw(texts, length), present=present),
        )
        for block in blocks
    ]
    words = rng.choice(["cat", "dog", "bank"], (texts, length))
    words[~present] = ""
    words[:, 0] = ""
    found = labels(rng.choice(["red", "blue"], (images, 4)), words, list(rng.choice(["a", "b"], max(images, texts))))
    return trace(*layers, grid=(2, 2)), found
