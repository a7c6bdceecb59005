"""Shapes to measure, in groups whose members take turns."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """One layer and its input.

    Attributes:
        tokens: of one call.
        dim: width of a token.
        num_subtokens: pieces of a token.
        num_experts: E.
        hidden_dim: inner width of an expert.
        top_k: choices of a sub-token.
        activation: ``gelu`` or ``swiglu``.
        bias: biases on the experts' matrices.
    """

    tokens: int = 1576
    dim: int = 768
    num_subtokens: int = 4
    num_experts: int = 8
    hidden_dim: int = 768
    top_k: int = 2
    activation: str = "gelu"
    bias: bool = True


@dataclass(frozen=True)
class Case:
    """One thing to time: a contender (see :mod:`~mhmoe_vl.benchmarks.contenders`) at a size."""

    name: str
    contender: str
    size: Size


_BASE = Size()
_SMALL = Size(tokens=1040, dim=192)
_DEVICE = replace(_BASE, tokens=25_216)
_GATED = replace(_BASE, activation="swiglu", bias=False)


def _cases(size: Size, *contenders: str) -> list[Case]:
    return [Case(contender, contender, size) for contender in contenders]


def _by(field: str, size: Size, values: tuple[int, ...], sign: str) -> list[Case]:
    """MH-MoE at several values of one field, named ``mh_moe <sign><value>``."""
    return [Case(f"mh_moe {sign}{value}", "mh_moe", replace(size, **{field: value})) for value in values]


def _thin_experts(name: str, size: Size) -> list[Case]:
    return [Case(f"{contender} {name}", contender, size) for contender in ("mh_moe", "grouped")]


def _on_device(size: Size) -> list[Case]:
    """MH-MoE by the path it takes there and by grouped products, at the least and the most experts, and the floors."""
    few, many = (replace(size, num_experts=count) for count in DEVICE_EXPERTS)
    names = [(f"{name} E{one.num_experts}", name, one) for one in (few, many) for name in ("mh_moe", "grouped")]
    return [*(Case(*name) for name in names), *_cases(few, "thick", "thin")]


EXPERTS = (8, 32, 128)
DEVICE_EXPERTS = (8, 128)
GROWING_TOKENS = (400, 1600, 6400, 12_800)
GROWING_EXPERTS = (8, 64, 256)

GROUPS: dict[str, list[Case]] = {
    "base": [*_by("num_experts", _BASE, EXPERTS, "E"), *_cases(_BASE, "thick", "thin")],
    "wide": [
        *_by("num_experts", replace(_BASE, hidden_dim=3072), EXPERTS, "E"),
        *_cases(replace(_BASE, hidden_dim=3072), "thick", "thin"),
    ],
    "one_hot": _cases(_BASE, "mh_moe", "one_hot"),
    "paths": _cases(_BASE, "mh_moe", "grouped", "filled", "split", "tiles", "cosine", "moe", "xmoe", "thick", "thin"),
    "small": _cases(_SMALL, "mh_moe", "thick", "thin"),
    "thin_experts": [
        *_thin_experts("E41", Size(2048, 96, 2, 41, 96, 2)),
        *_thin_experts("E165", Size(2048, 96, 4, 165, 48, 4)),
    ],
    "single": _cases(replace(_BASE, tokens=197), "mh_moe", "thick", "thin"),
    "skewed": _cases(_BASE, "balanced", "skewed"),
    "tokens": _by("tokens", _BASE, GROWING_TOKENS, "T"),
    "experts": _by("num_experts", replace(_BASE, tokens=12_800), GROWING_EXPERTS, "E"),
    "opponents": [
        *_cases(_BASE, "mh_moe", "torchscale", "torchscale_tutel"),
        *(Case(f"{name} no bias", name, replace(_BASE, bias=False)) for name in ("mh_moe", "megablocks")),
        *(Case(f"{name} swiglu", name, _GATED) for name in ("mh_moe", "transformers", "scattermoe")),
    ],
    "device": _on_device(_DEVICE),
    "device_wide": _on_device(replace(_DEVICE, hidden_dim=3072)),
}
"""Groups by name. MH-MoE at 1,576 tokens (8 pictures of 197), width 768, 4 sub-tokens and top-2 is the base; on an
accelerator 25,216 (128 pictures)."""

DEVICE_GROUPS = ("device", "device_wide")


def default_groups(device_type: str) -> list[str]:
    """What is measured when nothing is said: on an accelerator the groups whose sizes are meant for it."""
    return [name for name in GROUPS if (name in DEVICE_GROUPS) == (device_type != "cpu")]
