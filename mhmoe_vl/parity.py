"""Parameters and FLOPs of every FFN variant and of the encoder, in closed form, and widths that make two models equal.

FLOPs are 2 x multiply-adds of matrix products and convolutions, attention's two products over all pairs of tokens
included, as ``torch.utils.flop_counter`` counts them in a forward pass. Not counted: norms, activations, softmax,
biases, residuals, embedding look-ups, sorting and gathering of rows, the balance loss. Nothing is dropped and no token
is padding. Parameters are those that train; buffers are left out.

This module imports no torch, so that ``tools/count.py`` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from .checks import check_blocks, check_experts, check_heads, check_splitting, check_subtokens, patch_grid
from .config import CosineRouterConfig, DenseConfig, EncoderConfig, MHMoEConfig, MoEConfig, ParityConfig, RouterConfig
from .errors import ConfigError

PARTS = (
    "patch_embed",
    "embeddings",
    "attention",
    "dense_ffn",
    "experts",
    "shared_experts",
    "head_merge",
    "router",
    "norms",
    "heads",
)
"""Where parameters and FLOPs go, in the order of reports. ``heads`` are the task's output layers."""

WIDTH_STEP = 8
"""Solved widths are multiples of this: grouped products in 16 bits want rows of 16 bytes."""

MOST_DIFFERENCE = 10.0
"""Percent by which a solved layer may miss the baseline; beyond, parity counts as impossible."""

TEXT_LEN = 64
"""Text tokens unless given, or all positions where there are fewer: BEiT-3's length for image-text tasks."""


@dataclass(frozen=True)
class Cost:
    """Parameters, those that one token uses, and FLOPs of a forward pass.

    Attributes:
        parameters: all.
        active: without the experts that a token leaves out; a token of S sub-tokens reaches at most ``S * top_k``
            of them. In an encoder the branches of both modalities count.
        flops: 2 x multiply-adds.
    """

    parameters: int = 0
    active: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)


Parts = dict[str, Cost]
Inputs = Literal["pair", "image", "text"]


class Difference(NamedTuple):
    """How far something lies above (or, negative, below) the baseline, in percent."""

    flops: float
    parameters: float


def total(parts: Mapping[str, Cost]) -> Cost:
    """Sum over parts."""
    return sum(parts.values(), Cost())


def _add(costs: Iterable[Mapping[str, Cost]]) -> Parts:
    """Sum of several counts, part by part."""
    result: Parts = {}
    for parts in costs:
        for name, cost in parts.items():
            result[name] = result.get(name, Cost()) + cost
    return result


# ------------------------------------------------------------------------------------------- layers
def _linear(dim_in: int, dim_out: int, rows: int, *, bias: bool = True) -> Cost:
    parameters = dim_in * dim_out + bias * dim_out
    return Cost(parameters, parameters, 2 * rows * dim_in * dim_out)


def _norm(dim: int) -> Cost:
    return Cost(2 * dim, 2 * dim, 0)


def _mlp(dim: int, hidden_dim: int, rows: int, *, activation: str, bias: bool) -> Cost:
    """Two matrices, or three for SwiGLU (gate, value, output)."""
    first = _linear(dim, hidden_dim, rows, bias=bias)
    gate = first if activation == "swiglu" else Cost()
    return first + gate + _linear(hidden_dim, dim, rows, bias=bias)


def _repeat(cost: Cost, copies: int, active: int) -> Cost:
    """``copies`` alike, of which a token uses ``active`` and which together do the FLOPs of ``cost``."""
    return Cost(copies * cost.parameters, active * cost.active, cost.flops)


def count_ffn(ffn: DenseConfig | MoEConfig, dim: int, lengths: Sequence[int] = (1,)) -> Parts:
    """Cost of one FFN layer by part.

    Args:
        ffn: a section with numbers in it (no ``parity``).
        dim: width of a token.
        lengths: tokens of each sequence that goes through; only convolutional splitting sees more than their sum.

    Raises:
        ConfigError: ``dim`` cannot be cut into the sub-tokens.
    """
    tokens = sum(lengths)
    hidden_dim = 4 * dim if ffn.hidden_dim is None else ffn.hidden_dim
    mlp = partial(_mlp, activation=ffn.activation, bias=ffn.bias)
    if isinstance(ffn, DenseConfig):
        return {"dense_ffn": mlp(dim, hidden_dim, tokens) + (_norm(hidden_dim) if ffn.sub_ln else Cost())}
    num_subtokens = ffn.num_subtokens if isinstance(ffn, MHMoEConfig) else 1
    check_subtokens(dim, num_subtokens)
    rows = num_subtokens * sum(_split_length(ffn, length) for length in lengths)
    chosen = min(ffn.num_experts, num_subtokens * ffn.top_k)
    expert = mlp(dim // num_subtokens, hidden_dim, rows * ffn.top_k)
    parts = {
        "experts": _repeat(expert, ffn.num_experts, chosen),
        "router": _router(ffn.router, dim // num_subtokens, ffn.num_experts, rows),
    }
    if isinstance(ffn, MHMoEConfig):
        parts["head_merge"] = _head_merge(ffn, dim, lengths)
    if ffn.num_shared_experts:
        shared_dim = hidden_dim if ffn.shared_hidden_dim is None else ffn.shared_hidden_dim
        shared = mlp(dim, shared_dim, tokens * ffn.num_shared_experts)
        parts["shared_experts"] = _repeat(shared, ffn.num_shared_experts, ffn.num_shared_experts)
    return parts


def _split_length(ffn: MoEConfig, length: int) -> int:
    """Positions that a sequence has between head and merge layer."""
    if isinstance(ffn, MHMoEConfig) and ffn.conv_kernel is not None:
        return -(-length // ffn.conv_stride)
    return length


def _head_merge(ffn: MHMoEConfig, dim: int, lengths: Sequence[int]) -> Cost:
    if ffn.conv_kernel is None:
        return sum([_linear(dim, dim, sum(lengths))] * (ffn.head_layers + ffn.merge_layers), Cost())
    # A Conv1d and its transpose: every output (input) position meets the kernel's dim x dim matrices.
    positions = sum(_split_length(ffn, length) for length in lengths)
    one = _linear(dim * ffn.conv_kernel, dim, positions)
    return one + one


def _router(router: RouterConfig, dim: int, num_experts: int, rows: int) -> Cost:
    if not isinstance(router, CosineRouterConfig):
        return _linear(dim, num_experts, rows, bias=False)
    compared = _linear(dim, router.dim, rows, bias=False) + _linear(router.dim, num_experts, rows, bias=False)
    learned = int(router.learned_temperature)
    return compared + Cost(learned, learned, 0)


# ------------------------------------------------------------------------------------------ encoder
def image_tokens(encoder: EncoderConfig) -> int:
    """Tokens of an image: its patches and the class token."""
    size = (encoder.img_size, encoder.img_size) if isinstance(encoder.img_size, int) else encoder.img_size
    return 1 + math.prod(patch_grid(*size, encoder.patch_size))


def widest_input(encoder: EncoderConfig) -> Inputs:
    """A pair, or what the only branch takes."""
    return "pair" if len(set(encoder.modalities)) == 2 else encoder.modalities[0]


def count_encoder(
    encoder: EncoderConfig,
    *,
    inputs: Inputs = "pair",
    text_len: int | None = None,
    num_codes: int | None = None,
) -> Parts:
    """Cost of the encoder by part, in the order of :data:`PARTS`.

    Args:
        encoder: a section with numbers in it (no ``parity``; see :func:`resolve`).
        inputs: what the FLOPs are for: an image-text pair, an image alone, a text alone. Parameters are those of
            the whole encoder whatever the input.
        text_len: tokens of the text; none means :data:`TEXT_LEN`.
        num_codes: count the pre-training heads too: a biased linear layer to as many image codes and one to the
            vocabulary, both at every position (training scores masked positions only).

    Raises:
        ConfigError: no such encoder can be built, it has no branch for ``inputs``, or the text is too long.
    """
    _check(encoder)
    wanted = ("image", "text") if inputs == "pair" else (inputs,)
    if not set(wanted) <= set(encoder.modalities):
        raise ConfigError(f"modalities: {', '.join(encoder.modalities)} cannot take {inputs} inputs (add the other)")
    text_len = min(TEXT_LEN, encoder.max_text_len) if text_len is None else text_len
    if text_len > encoder.max_text_len:
        raise ConfigError(f"text_len: {text_len} tokens for {encoder.max_text_len} text positions (choose fewer)")
    tokens = {"text": text_len} | ({"image": image_tokens(encoder)} if "image" in encoder.modalities else {})
    lengths = {name: tokens[name] * (name in wanted) for name in sorted(set(encoder.modalities))}
    counts = [_embeddings(encoder, lengths), {"norms": _norms(encoder)}]
    counts += [_block(encoder, index, lengths, inputs == "pair") for index in range(encoder.depth)]
    if num_codes is not None:
        outputs = {"image": num_codes, "text": encoder.vocab_size}
        counts += [{"heads": _linear(encoder.embed_dim, outputs[name], n)} for name, n in lengths.items()]
    parts = _add(counts)
    return {name: parts[name] for name in PARTS if name in parts}


def _check(encoder: EncoderConfig) -> None:
    """What the encoder's constructor and those of its layers ask, so that no number stands for a model without one."""
    ffn, sparse = encoder.ffn, not isinstance(encoder.ffn, DenseConfig)
    asked = ("modalities", "multiway", "vl_ffn_layers", "depth", "moe_every", "expert_pool")
    check_blocks(sparse=sparse, **{name: getattr(encoder, name) for name in asked})
    check_heads(encoder.embed_dim, encoder.num_heads)
    if sparse:
        check_experts(ffn.num_experts, ffn.top_k)
    if isinstance(ffn, MHMoEConfig):
        asked = ("num_subtokens", "head_layers", "merge_layers", "conv_kernel", "conv_stride")
        check_splitting(encoder.embed_dim, **{name: getattr(ffn, name) for name in asked})


def _embeddings(encoder: EncoderConfig, lengths: Mapping[str, int]) -> Parts:
    dim, parts = encoder.embed_dim, {"patch_embed": Cost(), "embeddings": Cost()}
    if "image" in encoder.modalities:
        patches = image_tokens(encoder) - 1
        parts["patch_embed"] = _linear(3 * encoder.patch_size**2, dim, patches if lengths["image"] else 0)
        parts["embeddings"] += _table(patches + 3, dim)  # positions of patches and class token; class and mask token
    if "text" in encoder.modalities:
        parts["embeddings"] += _table(encoder.vocab_size + encoder.max_text_len, dim)
    return parts


def _table(rows: int, dim: int) -> Cost:
    return Cost(rows * dim, rows * dim, 0)


def _norms(encoder: EncoderConfig) -> Cost:
    """Two per block, the one inside attention, the last one; a copy per modality when decoupled."""
    copies = len(set(encoder.modalities)) if encoder.multiway == "decoupled" else 1
    norms = encoder.depth * (2 + encoder.attention_sub_ln) + encoder.final_norm
    return sum([_norm(encoder.embed_dim)] * copies * norms, Cost())


def _block(encoder: EncoderConfig, index: int, lengths: Mapping[str, int], paired: bool) -> Parts:
    """Attention and feed-forward layers of one block, without norms."""
    sparse = not isinstance(encoder.ffn, DenseConfig)
    has_experts = sparse and (index + 1) % encoder.moe_every == 0
    ffn = encoder.ffn if has_experts or not sparse else encoder.dense_ffn
    joint = encoder.multiway == "shared" or (has_experts and encoder.expert_pool == "joint")
    groups = [list(lengths.values())] if joint else [[length] for length in lengths.values()]
    if index >= encoder.depth - encoder.vl_ffn_layers:
        through_pair = list(lengths.values()) if paired else [0]
        groups = [[0] if paired else group for group in groups] + [through_pair]
    return _add([{"attention": _attention(encoder, lengths)}, *(count_ffn(ffn, encoder.embed_dim, g) for g in groups)])


def _attention(encoder: EncoderConfig, lengths: Mapping[str, int]) -> Cost:
    """Query, key, value and output projections per modality or shared; scores and sums over all pairs of tokens."""
    dim, tokens = encoder.embed_dim, sum(lengths.values())
    groups = list(lengths.values()) if encoder.multiway == "decoupled" else [tokens]
    projections = [_linear(dim, dim, length) for length in groups for _ in range(4)]
    return sum(projections, Cost(0, 0, 2 * 2 * tokens * tokens * dim))


# ------------------------------------------------------------------------------------------ solving
def resolve(encoder: EncoderConfig, parity: ParityConfig | None) -> EncoderConfig:
    """``encoder`` with numbers in place of ``parity`` in ``ffn`` and ``dense_ffn``; see :func:`solve_ffn`.

    Raises:
        ConfigError: there is something to solve and no baseline, or no solution.
    """
    solved = {}
    for name in ("ffn", "dense_ffn"):
        ffn = getattr(encoder, name)
        if not _unknown(ffn):
            continue
        if parity is None:
            raise ConfigError(f"encoder.{name}: 'parity' without a baseline (add a section parity, or give a number)")
        solved[name] = solve_ffn(ffn, encoder.embed_dim, parity, lengths=_typical_lengths(encoder))
    return encoder.model_copy(update=solved)


def difference(encoder: EncoderConfig, parity: ParityConfig, *, text_len: int | None = None) -> dict[str, Difference]:
    """How far the layer and the whole encoder lie from those of the baseline.

    Args:
        encoder: with numbers in it.
        parity: the baseline layer; the baseline encoder has it in place of ``ffn`` and is the same otherwise.
        text_len: tokens of the text in the pair that the encoder's FLOPs are for; see :func:`count_encoder`.

    Returns:
        ``layer`` and ``encoder``.
    """
    theirs = encoder.model_copy(update={"ffn": baseline_layer(parity)})
    whole = [total(count_encoder(e, inputs=widest_input(e), text_len=text_len)) for e in (encoder, theirs)]
    lengths = _typical_lengths(encoder)
    layer = [total(count_ffn(e.ffn, e.embed_dim, lengths)) for e in (encoder, theirs)]
    return {"layer": _percent(*layer), "encoder": _percent(*whole)}


def baseline_layer(parity: ParityConfig) -> MoEConfig:
    """The baseline as an FFN section: whole tokens, linear router."""
    return MoEConfig(**parity.model_dump(exclude={"rule"}))


def _percent(cost: Cost, baseline: Cost) -> Difference:
    return Difference(
        flops=100 * (cost.flops / baseline.flops - 1), parameters=100 * (cost.parameters / baseline.parameters - 1)
    )


def _typical_lengths(encoder: EncoderConfig) -> list[int]:
    return [image_tokens(encoder)] if "image" in encoder.modalities else [encoder.max_text_len]


def solve_ffn(
    ffn: DenseConfig | MoEConfig, dim: int, parity: ParityConfig, *, lengths: Sequence[int] = (1,)
) -> DenseConfig | MoEConfig:
    """``ffn`` with numbers in place of ``parity``, so that the layer costs what the baseline layer costs.

    Rule ``flops_and_parameters`` (paper 2's idea, with routers, biases and shared experts counted): of all widths and
    counts the pair whose larger relative difference is smallest; when only the width is unknown, equal FLOPs; when
    only the count is, equal parameters. The equations have two solutions: the one is taken whose router costs less
    than its experts. Rule ``parameters`` (paper 1's beta): equal parameters through the width alone. Widths are
    multiples of :data:`WIDTH_STEP` and counts whole, so a difference remains: see :func:`difference`.

    Args:
        ffn: section; without ``parity`` in it, it comes back as it is.
        dim: width of a token.
        parity: baseline and rule.
        lengths: tokens of a typical sequence; matters for convolutional splitting only.

    Raises:
        ConfigError: no width above 0 and count of at least ``top_k`` comes within :data:`MOST_DIFFERENCE`, or the
            rule does not fit.
    """
    unknown = _unknown(ffn)
    if not unknown:
        return ffn
    if parity.rule == "parameters" and "num_experts" in unknown:
        raise ConfigError("ffn.num_experts: 'parity' does not go with parity.rule 'parameters' (give a number)")
    by_flops = unknown == ["hidden_dim"] and parity.rule == "flops_and_parameters"
    compared = ["flops", "parameters"] if len(unknown) == 2 else ["flops" if by_flops else "parameters"]
    baseline = total(count_ffn(baseline_layer(parity), dim, lengths))

    def differences(candidate: DenseConfig | MoEConfig) -> list[float]:
        found = _percent(total(count_ffn(candidate, dim, lengths)), baseline)
        return [getattr(found, name) for name in compared]

    def worst(candidate: DenseConfig | MoEConfig) -> float:
        return max(map(abs, differences(candidate)))

    least = {name: WIDTH_STEP if name == "hidden_dim" else ffn.top_k for name in unknown}
    smallest = ffn.model_copy(update=least)
    settings = _widths(smallest, dim, lengths, baseline) if len(unknown) == 2 else [ffn]
    candidates = [c for setting in settings for c in _around_zero(setting, unknown[-1], differences)]
    if len(unknown) == 2:
        candidates = [c for c in candidates if _router_is_cheaper(c, dim)]
    candidates = [c for c in candidates if all(getattr(c, name) >= low for name, low in least.items())]
    nearest = min(candidates, key=worst, default=smallest)
    if worst(nearest) > MOST_DIFFERENCE:
        cost, tokens = total(count_ffn(nearest, dim, lengths)), sum(lengths)
        raise ConfigError(
            f"ffn: no {' and '.join(unknown)} gives {ffn.kind} the baseline's {baseline.flops // tokens} FLOPs a token"
            f" and {baseline.parameters} parameters: nearest is"
            f" {', '.join(f'{name} {getattr(nearest, name)}' for name in unknown)} with {cost.flops // tokens} and"
            f" {cost.parameters} (change the baseline or the numbers that are given)"
        )
    return nearest


def _unknown(ffn: DenseConfig | MoEConfig) -> list[str]:
    return [name for name in ("hidden_dim", "num_experts") if getattr(ffn, name, None) == "parity"]


def _widths(smallest: MoEConfig, dim: int, lengths: Sequence[int], baseline: Cost) -> list[MoEConfig]:
    """All widths whose experts do at most twice the baseline's FLOPs."""
    most = 2 * WIDTH_STEP * baseline.flops // count_ffn(smallest, dim, lengths)["experts"].flops
    return [smallest.model_copy(update={"hidden_dim": width}) for width in range(WIDTH_STEP, most, WIDTH_STEP)]


def _around_zero(
    ffn: DenseConfig | MoEConfig, name: str, differences: Callable[[DenseConfig | MoEConfig], list[float]]
) -> list[DenseConfig | MoEConfig]:
    """The two values of an unknown next to where the sum of differences is 0.

    Each grows linearly in the unknown, so that the larger of them in size is least at one of the two.
    """
    step = WIDTH_STEP if name == "hidden_dim" else 1
    at_zero, at_one = (sum(differences(ffn.model_copy(update={name: value}))) for value in (0, step))
    below = math.floor(at_zero / (at_zero - at_one))
    return [ffn.model_copy(update={name: step * steps}) for steps in (below, below + 1)]


def _router_is_cheaper(ffn: MoEConfig, dim: int) -> bool:
    parts = count_ffn(ffn, dim)
    return parts["router"].flops < parts["experts"].flops


def ffn_label(ffn: Mapping[str, Any]) -> str:
    """A layer's settings in short: kind, experts x inner width, choices per row, sub-tokens."""
    width = ffn["hidden_dim"] or "4d"
    if ffn["kind"] == "dense":
        return f"dense {width}"
    subtokens = f" h{ffn['num_subtokens']}" if "num_subtokens" in ffn else ""
    return f"{ffn['kind']} {ffn['num_experts']}x{width} k{ffn['top_k']}{subtokens}"
