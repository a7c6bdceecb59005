"""Triton kernels of :mod:`~mhmoe_vl.nn.fused_experts`. Imported only where Triton is.

Slots are the choices sorted by expert; a slot copies row ``row[slot]``. Widths of rows are at most 256, so all outputs
of a tile of slots stay on chip and the hidden activation of a tile lives only between two products. A width that is
the sum of two powers of two (192 = 128 + 64) is held as two tensors, because tensors on chip have powers of two as
their sides. Products are of the rows' type, sums float32. No kernel adds to memory that another one writes, so results
repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _find(pid, ends, num_experts, length, SKIP: tl.constexpr, BLOCK_E: tl.constexpr):
    """Expert, first slot and end of the ``pid``-th piece of ``length`` slots, counted over all experts' pieces but the
    first ``SKIP`` of each. Past the last piece the expert is not below ``num_experts``."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < num_experts, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    pieces = tl.maximum((end - start + length - 1) // length - SKIP, 0)
    upto = tl.cumsum(pieces, 0)
    expert = tl.sum((upto <= pid).to(tl.int32), 0)
    here = e == expert
    begin = tl.sum(tl.where(here, start + (SKIP + pid - (upto - pieces)) * length, 0), 0)
    return expert, begin, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _normal(z):
    """The normal distribution's cdf at z, and exp(-z^2 / 2): GELU is z cdf. Left of zero the cdf is the exponential
    times a polynomial, fitted to 4e-6: no division, one exponential."""
    a = tl.minimum(tl.abs(z), 5.5)
    bell = tl.exp2(-0.72134752 * z * z)
    poly = 0.0499412338 + a * (-0.0139241814 + a * (0.00231920775 - a * 0.000168570160))
    poly = 0.49999605 + a * (-0.398720258 + a * (0.24796034 + a * (-0.12582824 + a * poly)))
    tail = poly * bell
    return tl.where(z > 0, 1.0 - tail, tail), bell


@triton.jit
def forward_kernel(
    x, row, w1, b1, w2, b2, y, ends, num_experts,
    D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[slot] = W_2 gelu(W_1 x[row[slot]] + b_1) + b_2: a program a tile of one expert's slots."""
    expert, begin, stop = _find(tl.program_id(0), ends, num_experts, BLOCK_M, 0, BLOCK_E)
    if expert >= num_experts:
        return
    slot = begin + tl.arange(0, BLOCK_M)
    inside = slot < stop
    source = tl.load(row + slot, mask=inside, other=0)
    c0, c1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    x0 = tl.load(x + source[:, None] * D + c0[None, :], mask=inside[:, None], other=0.0)
    y0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1:
        x1 = tl.load(x + source[:, None] * D + c1[None, :], mask=inside[:, None], other=0.0)
        y1 = tl.zeros((BLOCK_M, D1), tl.float32)
    matrix = expert.to(tl.int64) * D * F
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        known = f < F
        z = tl.dot(x0, tl.load(w1 + matrix + c0[:, None] * F + f[None, :], mask=known[None, :], other=0.0))
        if D1:
            z = tl.dot(x1, tl.load(w1 + matrix + c1[:, None] * F + f[None, :], mask=known[None, :], other=0.0), z)
        if BIAS:
            z += tl.load(b1 + expert * F + f, mask=known, other=0.0)[None, :]
        cdf, _ = _normal(z)
        hidden = (z * cdf).to(x0.dtype)
        y0 = tl.dot(hidden, tl.load(w2 + matrix + f[:, None] * D + c0[None, :], mask=known[:, None], other=0.0), y0)
        if D1:
            y1 = tl.dot(hidden, tl.load(w2 + matrix + f[:, None] * D + c1[None, :], mask=known[:, None], other=0.0), y1)
    target = slot.to(tl.int64)[:, None] * D
    if BIAS:
        y0 += tl.load(b2 + expert * D + c0)[None, :]
    tl.store(y + target + c0[None, :], y0.to(x0.dtype), mask=inside[:, None])
    if D1:
        if BIAS:
            y1 += tl.load(b2 + expert * D + c1)[None, :]
        tl.store(y + target + c1[None, :], y1.to(x0.dtype), mask=inside[:, None])


@triton.jit
def backward_rows_kernel(
    x, grad, gate, row, w1, b1, w2, b2, grad_slot, grad_gate, db2, ends, num_experts,
    D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of the slots' inputs and gates, from those of the rows' outputs ``grad``; the hidden layer is computed
    anew. The gate's is the product of ``grad`` with the expert's output, taken in the hidden layer. ``db2`` gets a
    tile's part of the second bias's gradient."""
    tile = tl.program_id(0)
    expert, begin, stop = _find(tile, ends, num_experts, BLOCK_M, 0, BLOCK_E)
    if expert >= num_experts:
        return
    slot = begin + tl.arange(0, BLOCK_M)
    inside = slot < stop
    source = tl.load(row + slot, mask=inside, other=0)
    weight = tl.load(gate + slot, mask=inside, other=0.0)
    c0, c1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    x0 = tl.load(x + source[:, None] * D + c0[None, :], mask=inside[:, None], other=0.0)
    g0 = tl.load(grad + source[:, None] * D + c0[None, :], mask=inside[:, None], other=0.0)
    dx0 = tl.zeros((BLOCK_M, D0), tl.float32)
    score = tl.zeros((BLOCK_M,), tl.float32)
    if BIAS:
        score += tl.sum(g0.to(tl.float32) * tl.load(b2 + expert * D + c0)[None, :], 1)
        tl.store(db2 + tile * D + c0, tl.sum(g0.to(tl.float32) * weight[:, None], 0))
    if D1:
        x1 = tl.load(x + source[:, None] * D + c1[None, :], mask=inside[:, None], other=0.0)
        g1 = tl.load(grad + source[:, None] * D + c1[None, :], mask=inside[:, None], other=0.0)
        dx1 = tl.zeros((BLOCK_M, D1), tl.float32)
        if BIAS:
            score += tl.sum(g1.to(tl.float32) * tl.load(b2 + expert * D + c1)[None, :], 1)
            tl.store(db2 + tile * D + c1, tl.sum(g1.to(tl.float32) * weight[:, None], 0))
    matrix = expert.to(tl.int64) * D * F
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        known = f < F
        v0 = tl.load(w1 + matrix + c0[:, None] * F + f[None, :], mask=known[None, :], other=0.0)
        u0 = tl.load(w2 + matrix + f[:, None] * D + c0[None, :], mask=known[:, None], other=0.0)
        z, dh = tl.dot(x0, v0), tl.dot(g0, tl.trans(u0))
        if D1:
            v1 = tl.load(w1 + matrix + c1[:, None] * F + f[None, :], mask=known[None, :], other=0.0)
            u1 = tl.load(w2 + matrix + f[:, None] * D + c1[None, :], mask=known[:, None], other=0.0)
            z, dh = tl.dot(x1, v1, z), tl.dot(g1, tl.trans(u1), dh)
        if BIAS:
            z += tl.load(b1 + expert * F + f, mask=known, other=0.0)[None, :]
        cdf, bell = _normal(z)
        score += tl.sum(z * cdf * dh, 1)
        dz = (dh * weight[:, None] * (cdf + 0.3989422804 * z * bell)).to(x0.dtype)
        dx0 = tl.dot(dz, tl.trans(v0), dx0)
        if D1:
            dx1 = tl.dot(dz, tl.trans(v1), dx1)
    target = slot.to(tl.int64)[:, None] * D
    tl.store(grad_slot + target + c0[None, :], dx0.to(x0.dtype), mask=inside[:, None])
    if D1:
        tl.store(grad_slot + target + c1[None, :], dx1.to(x0.dtype), mask=inside[:, None])
    tl.store(grad_gate + slot, score, mask=inside)


@triton.jit
def backward_weights_kernel(
    x, grad, gate, row, w1, b1, w2, dw1, db1, dw2, more_dw1, more_db1, more_dw2, ends, num_experts, chunk,
    D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BIAS: tl.constexpr,
    MATRIX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of W_1 and b_1, or of W_2: a program a block of the hidden layer and a chunk of an expert's slots.

    First chunks write to ``dw1`` and so on, later ones to their own places in ``more_dw1`` and so on, which
    :func:`add_pieces_kernel` adds. Products are turned round (hidden first), so that what was just computed is the
    left factor of the next product and need not leave the registers.
    """
    part, piece = tl.program_id(0), tl.program_id(1)
    expert, begin, stop = _find(tl.maximum(piece - num_experts, 0), ends, num_experts, chunk, 1, BLOCK_E)
    if piece < num_experts:
        expert = piece
        begin = tl.load(ends + piece - 1, mask=piece > 0, other=0)
        stop = tl.load(ends + piece)
    if expert >= num_experts:
        return
    stop = tl.minimum(stop, begin + chunk)
    if piece >= num_experts:
        piece -= num_experts
        dw1, db1, dw2 = more_dw1, more_db1, more_dw2
    c0, c1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    f = part * BLOCK_F + tl.arange(0, BLOCK_F)
    known = f < F
    matrix = expert.to(tl.int64) * D * F
    v0 = tl.load(w1 + matrix + c0[None, :] * F + f[:, None], mask=known[:, None], other=0.0)
    if MATRIX == 1:
        u0 = tl.load(w2 + matrix + f[:, None] * D + c0[None, :], mask=known[:, None], other=0.0)
        dv0 = tl.zeros((BLOCK_F, D0), tl.float32)
    if MATRIX == 2:
        du0 = tl.zeros((BLOCK_F, D0), tl.float32)
    if D1:
        v1 = tl.load(w1 + matrix + c1[None, :] * F + f[:, None], mask=known[:, None], other=0.0)
        if MATRIX == 1:
            u1 = tl.load(w2 + matrix + f[:, None] * D + c1[None, :], mask=known[:, None], other=0.0)
            dv1 = tl.zeros((BLOCK_F, D1), tl.float32)
        if MATRIX == 2:
            du1 = tl.zeros((BLOCK_F, D1), tl.float32)
    if BIAS:
        bias = tl.load(b1 + expert * F + f, mask=known, other=0.0)
    dbias = tl.zeros((BLOCK_F,), tl.float32)
    for first in range(begin, stop, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        inside = slot < stop
        source = tl.load(row + slot, mask=inside, other=0)
        weight = tl.load(gate + slot, mask=inside, other=0.0)
        x0 = tl.load(x + source[:, None] * D + c0[None, :], mask=inside[:, None], other=0.0)
        g0 = tl.load(grad + source[:, None] * D + c0[None, :], mask=inside[:, None], other=0.0)
        z = tl.dot(v0, tl.trans(x0))
        if MATRIX == 1:
            dh = tl.dot(u0, tl.trans(g0))
        if D1:
            x1 = tl.load(x + source[:, None] * D + c1[None, :], mask=inside[:, None], other=0.0)
            g1 = tl.load(grad + source[:, None] * D + c1[None, :], mask=inside[:, None], other=0.0)
            z = tl.dot(v1, tl.trans(x1), z)
            if MATRIX == 1:
                dh = tl.dot(u1, tl.trans(g1), dh)
        if BIAS:
            z += bias[:, None]
        cdf, bell = _normal(z)
        if MATRIX == 2:
            hidden = (z * cdf * weight[None, :]).to(x0.dtype)
            du0 = tl.dot(hidden, g0, du0)
            if D1:
                du1 = tl.dot(hidden, g1, du1)
        if MATRIX == 1:
            dz = dh * weight[None, :] * (cdf + 0.3989422804 * z * bell)
            if BIAS:
                dbias += tl.sum(dz, 1)
            dz = dz.to(x0.dtype)
            dv0 = tl.dot(dz, x0, dv0)
            if D1:
                dv1 = tl.dot(dz, x1, dv1)
    place = piece.to(tl.int64) * D * F
    if MATRIX == 1:
        tl.store(dw1 + place + c0[None, :] * F + f[:, None], dv0, mask=known[:, None])
        if D1:
            tl.store(dw1 + place + c1[None, :] * F + f[:, None], dv1, mask=known[:, None])
        if BIAS:
            tl.store(db1 + piece * F + f, dbias, mask=known)
    if MATRIX == 2:
        tl.store(dw2 + place + f[:, None] * D + c0[None, :], du0, mask=known[:, None])
        if D1:
            tl.store(dw2 + place + f[:, None] * D + c1[None, :], du1, mask=known[:, None])


@triton.jit
def add_pieces_kernel(
    total, pieces, ends, num_experts, size, length,
    SKIP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """total[expert] = the sum, in order, of an expert's pieces of ``length`` slots, each ``size`` numbers; with
    ``SKIP`` 1 the first of them stands in ``total`` and not in ``pieces``."""
    expert = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < num_experts, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    counts = tl.maximum((end - start + length - 1) // length - SKIP, 0)
    before = tl.sum(tl.where(e < expert, counts, 0), 0)
    own = tl.sum(tl.where(e == expert, counts, 0), 0)
    if own < SKIP:
        return
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = column < size
    place = total + expert.to(tl.int64) * size + column
    value = tl.zeros((BLOCK,), tl.float32)
    if SKIP:
        value += tl.load(place, mask=known)
    piece = pieces + before.to(tl.int64) * size + column
    for _ in range(own):
        value += tl.load(piece, mask=known)
        piece += size
    tl.store(place, value, mask=known)


@triton.jit
def gather_sum_kernel(
    y, slot, gate, out, num_rows,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of gate[t, k] y[slot[k, t]]; without gates the plain sum."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    known = t < num_rows
    c0, c1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    o0 = tl.zeros((BLOCK_T, D0), tl.float32)
    o1 = tl.zeros((BLOCK_T, D1 if D1 else 1), tl.float32)
    for k in range(TOP_K):
        source = tl.load(slot + k * num_rows + t, mask=known, other=0)
        part0 = tl.load(y + source[:, None] * D + c0[None, :], mask=known[:, None], other=0.0).to(tl.float32)
        if D1:
            part1 = tl.load(y + source[:, None] * D + c1[None, :], mask=known[:, None], other=0.0).to(tl.float32)
        if GATED:
            weight = tl.load(gate + t * TOP_K + k, mask=known, other=0.0)
            part0 *= weight[:, None]
            if D1:
                part1 *= weight[:, None]
        o0 += part0
        if D1:
            o1 += part1
    target = t.to(tl.int64)[:, None] * D
    tl.store(out + target + c0[None, :], o0.to(out.dtype.element_ty), mask=known[:, None])
    if D1:
        tl.store(out + target + c1[None, :], o1.to(out.dtype.element_ty), mask=known[:, None])
