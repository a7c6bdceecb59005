"""Promise 11: routing is exact and finite in every odd case, bad rows stay alone and are seen, collapse is told of."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from mhmoe_vl.nn.mh_moe import MultiHeadMoE
from mhmoe_vl.nn.moe import MoE
from mhmoe_vl.train.alarms import DEAD_STEPS, CollapseAlarm, share_limit

from .harness import Found

TITLE = "routing"
WIDTHS = (8, 16, 24)
BAD = (float("nan"), float("inf"), float("-inf"))


def _layer(draw: random.Random) -> tuple[torch.nn.Module, int, int]:
    """A random layer, its width, and its number of sub-tokens."""
    experts = draw.randint(1, 32)
    dim, subtokens = draw.choice(WIDTHS), draw.choice([1, 1, 2, 4, 8])
    options = {
        "num_experts": experts,
        "top_k": draw.randint(1, experts),
        "hidden_dim": draw.choice([1, 3, 8, 16]),
        "activation": draw.choice(["gelu", "relu", "swiglu"]),
        "bias": draw.random() < 0.5,
        "router": {"kind": draw.choice(["linear", "cosine"]), "gate": draw.choice(["softmax", "sigmoid"])},
        "normalize_gates": draw.random() < 0.5,
        "capacity_factor": draw.choice([None, None, 0.1, 1.0, 1.25, 3.0]),
        "balance_share": draw.choice(["first", "all"]),
    }
    if draw.random() < 0.3:
        return MoE(dim, **options), dim, 1
    return MultiHeadMoE(dim, num_subtokens=subtokens, **options), dim, subtokens


def _skew(layer: torch.nn.Module, draw: random.Random) -> str:
    """Leave the router as it is, make all experts tie, or send every row to one expert."""
    kind = draw.choice(["as drawn", "as drawn", "ties", "one expert"])
    router = layer.routed.router
    weight = router.weight if hasattr(router, "weight") else router.embedding
    with torch.no_grad():
        if kind == "ties":
            weight.zero_()
        elif kind == "one expert":
            weight.mul_(1e-6)
            weight[draw.randrange(len(weight))] += 100.0
    return kind


def check(folder: Path, full: bool) -> Found:
    found, draw = Found(""), random.Random(0)
    torch.manual_seed(0)
    cases, bad_cases = (10_000, 2_000) if full else (300, 60)
    rows = 0
    for number in range(cases):
        problem, count = _case(draw)
        rows += count
        if problem and len(found.failures) < 20:
            found.failures.append(f"case {number}: {problem}")
    for number in range(bad_cases):
        if (problem := _bad_row(draw)) and len(found.failures) < 20:
            found.failures.append(f"bad row {number}: {problem}")
    alarms = _alarms(found)
    found.figure = (
        f"{cases:,} random cases, {rows:,} rows: counts + drops = rows x top_k, outputs and gradients finite;"
        f" {bad_cases:,} with NaN or infinite rows: indices valid, counts exact, other rows unchanged, the layer's"
        f" entropy tells; {alarms} collapse alarms as worked out by hand"
    )
    if found.failures:
        found.figure = f"failures in {cases:,} random cases"
    found.numbers = {"cases": cases, "rows": rows, "bad_cases": bad_cases}
    return found


def _inputs(draw: random.Random, dim: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    tokens = draw.choice([0, 1, 2, draw.randint(0, 64)])
    x = torch.randn(1, tokens, dim) * draw.choice([1e-3, 1.0, 30.0])
    if draw.random() < 0.2:
        x = x[:, :1].expand(1, tokens, dim).clone() if tokens else x  # all alike
    padding = torch.rand(1, tokens) < draw.choice([0.0, 0.3, 1.0]) if draw.random() < 0.4 else None
    return x, padding, dtype


def _case(draw: random.Random) -> tuple[str | None, int]:
    layer, dim, subtokens = _layer(draw)
    x, padding, dtype = _inputs(draw, dim)
    kind = _skew(layer, draw)
    layer.train(draw.random() < 0.7)
    if dtype == torch.float64:
        layer, x = layer.double(), x.double()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer.forward_streams([x], [padding], return_routing=True)
    stats, routing = output.stats, output.routing
    tokens = x.shape[1] if padding is None else int((~padding).sum())
    choices = tokens * subtokens * layer.routed.top_k
    place = f"{type(layer).__name__} {kind} {dtype} {tuple(x.shape)} {layer.routed.extra_repr()}"
    if int(stats.load.sum()) != choices or int(routing.kept.sum()) + int(stats.dropped) != choices:
        return f"{place}: {int(stats.load.sum())} chosen, {int(stats.dropped)} dropped of {choices}", tokens * subtokens
    loss = output.x[0].float().square().sum() + sum(value.float() for value in output.aux_losses.values())
    loss.backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None] + [x.grad]
    if not torch.isfinite(output.x[0]).all() or not torch.isfinite(loss) or not _finite(gradients):
        return f"{place}: not finite", tokens * subtokens
    return None, tokens * subtokens


def _finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _bad_row(draw: random.Random) -> str | None:
    """One token holds NaN or infinity; in evaluation, so that no capacity couples rows."""
    layer, dim, subtokens = _layer(draw)
    layer.eval()
    tokens = draw.randint(2, 40)
    x = torch.randn(1, tokens, dim)
    victim = draw.randrange(tokens)
    bad = x.clone()
    bad[0, victim, draw.randrange(dim)] = draw.choice(BAD)
    place = f"{type(layer).__name__} {layer.routed.extra_repr()}"
    with torch.no_grad():
        good, output = (layer.forward_streams([v], [None], return_routing=True) for v in (x, bad))
    others = [number for number in range(tokens) if number != victim]
    experts, stats = output.routing.experts, output.stats
    if int(experts.min()) < 0 or int(experts.max()) >= layer.routed.num_experts:
        return f"{place}: expert {int(experts.max())}"
    if int(stats.load.sum()) != tokens * subtokens * layer.routed.top_k:
        return f"{place}: {int(stats.load.sum())} choices counted"
    torch.testing.assert_close(output.x[0][0, others], good.x[0][0, others], rtol=1e-5, atol=1e-6)
    if torch.isfinite(output.x[0][0, victim]).all():
        return f"{place}: the bad row came out finite"
    if torch.isfinite(stats.entropy):
        return f"{place}: nothing in the statistics tells of it"
    return None


def _alarms(found: Found) -> int:
    """Shares above min(4/E, 0.9), and experts without a choice for 1,000 steps; each told once."""
    table = [
        (8, [0.51] + [0.07] * 7, 1), (8, [0.49] + [0.0728] * 7, 0), (4, [0.91, 0.03, 0.03, 0.03], 1),
        (4, [0.89, 0.05, 0.03, 0.03], 0), (2, [0.95, 0.05], 1), (2, [0.85, 0.15], 0), (1, [1.0], 0),
        (64, [0.07] + [0.93 / 63] * 63, 1), (64, [0.06] + [0.94 / 63] * 63, 0),
    ]  # fmt: skip
    for experts, shares, expected in table:
        told = CollapseAlarm({}).check(1, {"load/a": shares})
        if (told[0], len(told[1])) != (expected, expected):
            found.failures.append(f"alarm for {experts} experts, largest share {shares[0]}: {told}")
    alarm, dead = CollapseAlarm({}), {"load/a": [0.5, 0.5, 0.0], "load/b": [0.4, 0.3, 0.3]}
    lines = [alarm.check(step, dead) for step in range(100, 100 + DEAD_STEPS + 300, 100)]
    raised = [number for number, (count, _) in enumerate(lines) if count]
    if raised != [10, 11, 12] or [len(new) for _, new in lines] != [0] * 10 + [1, 0, 0] or share_limit(8) != 0.5:
        found.failures.append(f"alarm for a dead expert: {lines}")
    return len(table) + 1
