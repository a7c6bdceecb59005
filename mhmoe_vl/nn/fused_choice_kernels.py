"""Triton kernels of :mod:`~mhmoe_vl.nn.fused_choice`. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softmax(logits, t, inside, num_experts, e):
    """Logits, their log-sum-exp and softmax for the rows ``t``; columns past the last expert are zero."""
    real = inside[:, None] & (e < num_experts)[None, :]
    place = logits + t.to(tl.int64)[:, None] * num_experts + e[None, :]
    value = tl.load(place, mask=real, other=float("-inf"))
    value = tl.where(inside[:, None], value, 0.0)
    high = tl.max(value, 1)
    powers = tl.exp(value - high[:, None])
    total = tl.sum(powers, 1)
    return tl.where(real, value, 0.0), high + tl.log(total), tl.where(real, powers / total[:, None], 0.0), real


@triton.jit
def forward_kernel(
    logits, experts, gates, parts, start, stop, num_experts,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best experts and gates of the rows ``start`` to ``stop``; ``parts`` gets a block's sums."""
    t = start + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = t < stop
    value, log_sum, probability, real = _softmax(logits, t, inside, num_experts, e)
    # As with topk, NaN counts as the largest; no expert is taken twice, and none that does not exist.
    left = tl.where(value == value, tl.maximum(value, -3.0e38), float("inf"))
    left = tl.where((e < num_experts)[None, :], left, float("-inf"))
    chosen, weights = tl.zeros((BLOCK_T, BLOCK_K), tl.int32), tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    out = parts + tl.program_id(0) * (3 * num_experts + 2)
    load = tl.zeros((BLOCK_E,), tl.float32)
    for number in tl.static_range(TOP_K):
        best = tl.argmax(left, 1)
        taken = e[None, :] == best[:, None]
        left = tl.where(taken, float("-inf"), left)
        load += tl.sum((taken & real).to(tl.float32), 0)
        if number == 0:
            tl.store(out + e, load, mask=e < num_experts)
        weight = tl.sum(tl.where(taken, probability, 0.0), 1)
        chosen = tl.where(k[None, :] == number, best[:, None], chosen)
        weights = tl.where(k[None, :] == number, weight[:, None], weights)
    if NORMALIZE:
        weights /= tl.maximum(tl.sum(weights, 1), 1.2e-38)[:, None]
    place = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
    wanted = inside[:, None] & (k < TOP_K)[None, :]
    tl.store(experts + place, chosen.to(tl.int64), mask=wanted)
    tl.store(gates + place, weights, mask=wanted)
    tl.store(out + num_experts + e, load, mask=e < num_experts)
    tl.store(out + 2 * num_experts + e, tl.sum(probability, 0), mask=e < num_experts)
    entropy = log_sum - tl.sum(probability * value, 1)
    tl.store(out + 3 * num_experts, tl.sum(tl.where(inside, log_sum * log_sum, 0.0), 0))
    tl.store(out + 3 * num_experts + 1, tl.sum(tl.where(inside, entropy, 0.0), 0))


@triton.jit
def backward_kernel(
    logits, experts, gates, grad_gates, grad_sums, grad, start, stop, num_experts,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from those of the gates and of the sums of probabilities and of squares."""
    t = start + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = t < stop
    _, log_sum, probability, real = _softmax(logits, t, inside, num_experts, e)
    place = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
    wanted = inside[:, None] & (k < TOP_K)[None, :]
    weights = tl.load(gates + place, mask=wanted, other=0.0)
    mean = tl.sum(weights * tl.load(grad_gates + place, mask=wanted, other=0.0), 1)
    of_probability = tl.load(grad_sums + 2 * num_experts + e, mask=e < num_experts, other=0.0)
    of_square = tl.load(grad_sums + 3 * num_experts)
    scale = 2.0 * log_sum * of_square - tl.sum(probability * of_probability[None, :], 1)
    # Gates divided by their sum are the softmax over the chosen logits alone, others that over all.
    if not NORMALIZE:
        scale -= mean
    total = probability * (of_probability[None, :] + scale[:, None])
    for number in tl.static_range(TOP_K):
        flat = t.to(tl.int64) * TOP_K + number
        expert = tl.load(experts + flat, mask=inside, other=-1)
        part = tl.load(grad_gates + flat, mask=inside, other=0.0)
        if NORMALIZE:
            part -= mean
        part *= tl.load(gates + flat, mask=inside, other=0.0)
        total += tl.where(e[None, :] == expert[:, None], part[:, None], 0.0)
    tl.store(grad + t.to(tl.int64)[:, None] * num_experts + e[None, :], total, mask=real)
