"""Whole training steps (masked prediction on pictures, texts and pairs), and heads at masked positions only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F

from ..config import EncoderConfig, ParityConfig, RunConfig, merge, run_config, validate
from ..models.factory import build_encoder, model_config
from ..parity import Inputs, count_encoder, image_tokens, resolve, total
from ..tasks.masked_batch import MaskedBatch
from ..tasks.masked_modeling import MaskedModeling, MaskedModelingModel
from ..train.step import Trainer

NUM_CODES = 8192
IMAGE_RATIO, TEXT_RATIO = 0.4, 0.15


@dataclass(frozen=True)
class StepSize:
    """A model and its batch.

    Attributes:
        model: named dense model whose sizes are taken.
        overrides: of its encoder section.
        expert_dim: inner width of the baseline's 8 experts, top-1: that of the dense layer.
        samples: pictures alone, as many texts alone, and as many pairs.
        text_len: tokens of a text.
    """

    model: str
    overrides: dict[str, Any]
    expert_dim: int
    samples: int
    text_len: int


SIZES = {
    "base": StepSize("beit3_base_patch16_224", {}, 3072, 4, 64),
    "tiny": StepSize("beit3_tiny_patch16_224", {"img_size": 128, "max_text_len": 64, "vocab_size": 49410}, 768, 16, 32),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "hidden_dim": "parity", "sub_ln": True},
    "mh_moe": {
        "kind": "mh_moe",
        "num_experts": "parity",
        "hidden_dim": "parity",
        "top_k": 2,
        "num_subtokens": 4,
        "router": {"kind": "linear"},
    },
}
"""Feed-forward layers at equal FLOPs; MH-MoE has the parameters of 8 experts in every second block."""


class _DrawnBatches(MaskedModeling):
    """The task of masked prediction with batches that are made up: its losses without shards and tokenizers."""

    def __init__(self) -> None:
        self.streams = {"images": {}, "texts": {}, "pairs": {}}

    def prepare(self, batch: MaskedBatch, device: torch.device) -> MaskedBatch:
        return batch


def drawn_batch(encoder: EncoderConfig, size: StepSize) -> MaskedBatch:
    """Random pictures, texts, masks and targets from seed 0."""
    generator = torch.Generator().manual_seed(0)
    pictures, (height, width) = 2 * size.samples, _pair(encoder.img_size)
    patches = (height // encoder.patch_size) * (width // encoder.patch_size)

    def positions(count: int, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A mask (samples, count), and its places as flat indices, equally many in every sample."""
        order = torch.rand(pictures, count, generator=generator).argsort(1)
        mask = order < round(ratio * count)
        return mask, mask.flatten().nonzero().flatten()

    image_mask, image_positions = positions(patches, IMAGE_RATIO)
    _, text_positions = positions(size.text_len, TEXT_RATIO)
    each = {"image": len(image_positions) // pictures, "text": len(text_positions) // pictures}
    own = {kind: torch.arange(size.samples).repeat_interleave(count) for kind, count in each.items()}
    return MaskedBatch(
        images=torch.rand(pictures, 3, height, width, generator=generator) * 2 - 1,
        image_mask=image_mask,
        image_positions=image_positions,
        image_targets=torch.randint(NUM_CODES, (len(image_positions),), generator=generator),
        text=torch.randint(encoder.vocab_size, (pictures, size.text_len), generator=generator),
        text_padding=torch.zeros(pictures, size.text_len, dtype=torch.bool),
        text_positions=text_positions,
        text_targets=torch.randint(encoder.vocab_size, (len(text_positions),), generator=generator),
        num_pairs=size.samples,
        samples={"images": own["image"], "pairs_image": own["image"], "texts": own["text"], "pairs_text": own["text"]},
        ids={name: [f"{name}/{i}" for i in range(size.samples)] for name in ("images", "texts", "pairs")},
    )


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    return img_size if isinstance(img_size, tuple) else (img_size, img_size)


def encoder_section(size: StepSize, variant: str, depth: int | None = None) -> EncoderConfig:
    """The dense model's section with the variant's feed-forward layer, ``parity`` not solved yet."""
    overrides = merge(size.overrides, {"ffn": VARIANTS[variant]} | ({"depth": depth} if depth else {}))
    return model_config(size.model, **overrides)


def step_flops(size: StepSize, variant: str, depth: int | None = None) -> int:
    """Operations of the products of an update: encoder, and heads at the masked positions, forward and (twice as many)
    backward; pixels have no gradient."""
    section = resolve(encoder_section(size, variant, depth), _baseline(size))
    inputs = [total(count_encoder(section, inputs=kind, text_len=size.text_len)).flops for kind in get_args(Inputs)]
    codes = round(IMAGE_RATIO * (image_tokens(section) - 1)) * NUM_CODES
    words = round(TEXT_RATIO * size.text_len) * section.vocab_size
    pixels = 2 * 2 * (image_tokens(section) - 1) * section.embed_dim * 3 * section.patch_size**2
    return size.samples * (3 * (sum(inputs) + 2 * 2 * section.embed_dim * (codes + words)) - pixels)


def _baseline(size: StepSize) -> ParityConfig:
    return ParityConfig(num_experts=8, hidden_dim=size.expert_dim, top_k=1)


def make_step(
    size: StepSize, variant: str, precision: str, device: torch.device, depth: int | None = None
) -> Callable[[], float]:
    """A function that makes one update (forward, backward, clipping, AdamW) and returns its loss.

    Args:
        size: model and batch.
        variant: one of :data:`VARIANTS`.
        precision: ``float32`` or ``bfloat16``.
        device: where.
        depth: blocks, instead of the model's own.
    """
    torch.manual_seed(0)
    settings = validate(
        run_config("masked_modeling"),
        {
            "task": {"kind": "masked_modeling"},
            "optim": {"lr": 1e-4, "warmup_steps": 0, "clip_grad": 1.0},
            "train": {"precision": precision, "steps": 1_000_000},
        },
        "benchmark",
    )
    section = encoder_section(size, variant, depth)
    return _updates(settings, MaskedModelingModel(build_encoder(section, _baseline(size)), num_codes=NUM_CODES),
                    drawn_batch(section, size), device)  # fmt: skip


def _updates(
    settings: RunConfig, model: MaskedModelingModel, batch: MaskedBatch, device: torch.device
) -> Callable[[], float]:
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()
    }
    trainer, part = Trainer(_DrawnBatches(), model, settings, device), MaskedBatch(**moved)
    model.train()
    trainer.distribute()
    counts = trainer.count([part])

    def update() -> float:
        return trainer.update(0, [part], counts, logged=True).values["loss"]

    return update


# ------------------------------------------------------------------------------------------------ heads
def make_heads(
    tokens: int, dim: int, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], float]]:
    """Loss and gradients of a vocabulary head: scores at ``masked`` positions (15 %) or at ``all`` of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(tokens, dim, generator=generator).to(device).requires_grad_()
    head = torch.nn.Linear(dim, vocab_size).to(device)
    masked = torch.rand(tokens, generator=generator).argsort()[: round(TEXT_RATIO * tokens)].sort().values.to(device)
    targets = torch.randint(vocab_size, (len(masked),), generator=generator).to(device)

    def run(everywhere: bool) -> float:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            chosen = head(features)[masked] if everywhere else head(features.index_select(0, masked))
            loss = F.cross_entropy(chosen.float(), targets)
        torch.autograd.grad(loss, [features, head.weight, head.bias])
        return loss.item()

    return {"masked": lambda: run(False), "all": lambda: run(True)}
