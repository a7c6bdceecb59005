"""Routers: formulas by hand, float32 under autocast, initialisation, choice and gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.nn.router import CosineRouter, LinearRouter, build_router, choose_experts, count_experts

KINDS = [{"kind": kind, "gate": gate} for kind in ("linear", "cosine") for gate in ("softmax", "sigmoid")]


def test_cosine_router_is_a_cosine_over_a_temperature():
    torch.manual_seed(0)
    router, rows = CosineRouter(6, 5), torch.randn(4, 6)
    with torch.no_grad():
        router.log_temperature.fill_(math.log(0.5))
    scores = router(rows)
    cosines = cosine_similarity(router.proj(rows).unsqueeze(1), router.embedding.unsqueeze(0), dim=-1)
    assert torch.allclose(scores.logits, cosines / 0.5, atol=1e-5)
    assert torch.allclose(scores.balance_logits, cosines / 0.3, atol=1e-5), "the loss keeps the first temperature"


@pytest.mark.parametrize(("gate", "start"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_first_temperature_of_the_papers(gate, start):
    assert CosineRouter(4, 3, gate=gate).log_temperature.exp().item() == pytest.approx(start)


@pytest.mark.parametrize("options", KINDS)
def test_autocast_changes_nothing(options):
    torch.manual_seed(0)
    router = build_router(32, 8, options)
    rows = torch.randn(5000, 32)
    plain = router(rows).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(rows).logits
        lowered = router(rows.bfloat16()).logits
    assert cast.dtype == lowered.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert torch.equal(router(rows.bfloat16().float()).logits, lowered)
    assert (plain.topk(2).indices != plain.bfloat16().topk(2).indices).any(), "bfloat16 would have changed choices"


@pytest.mark.parametrize("options", KINDS)
def test_no_ties_at_the_start(options):
    torch.manual_seed(0)
    logits = build_router(16, 64, options)(torch.randn(50, 16)).logits
    assert logits.std(dim=-1).min() > 1e-3
    chosen = count_experts(logits.argmax(-1), 64)
    assert chosen.sum() == 50 and (chosen > 0).sum() > 16


def test_orthogonal_embeddings_of_length_0_32():
    embedding = CosineRouter(8, 4, dim=16).embedding
    assert torch.allclose(embedding @ embedding.T, 0.32**2 * torch.eye(4), atol=1e-6)


def test_gates_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.0, -1.0]])
    gates = logits.softmax(-1)
    experts, chosen = choose_experts(logits, gates, 2, normalize=True, bias=None)
    assert experts.tolist() == [[1, 2], [0, 1]]
    assert torch.allclose(chosen, torch.tensor([[3.0, 2.0], [0.5, 0.0]]).softmax(-1))
    _, raw = choose_experts(logits, gates, 2, normalize=False, bias=None)
    assert torch.allclose(raw, gates.gather(1, experts))
    _, single = choose_experts(logits, gates, 1, normalize=True, bias=None)
    assert torch.equal(single, raw[:, :1]), "one choice keeps its raw gate"


def test_bias_chooses_but_does_not_mix():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    gates = logits.softmax(-1)
    experts, chosen = choose_experts(logits, gates, 1, normalize=False, bias=torch.tensor([0.0, 0.0, 1.0]))
    assert experts.tolist() == [[2]]
    assert torch.equal(chosen, gates[:, 2:])


def test_extreme_logits_stay_finite():
    for gate in ("softmax", "sigmoid"):
        router = LinearRouter(2, 4, gate=gate)
        rows = torch.tensor([[1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
        logits = router(rows).logits
        _, gates = choose_experts(logits, router.gates(logits), 2, normalize=True, bias=None)
        (gates.square().sum() + logits.logsumexp(-1).square().mean()).backward()
        assert gates.isfinite().all() and rows.grad.isfinite().all() and router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "hash"}, ("'hash'", "linear, cosine")),
        ({"kind": "linear", "gate": "tanh"}, ("'tanh'",)),
        ({"kind": "linear", "temperature": 1.0}, ("temperature", "'linear'")),
        ({"kind": "cosine", "initial_temperature": -1.0}, ("-1.0",)),
        ({"kind": "cosine", "dim": 0}, ("dim 0",)),
        ({"dim": 4}, ("{'dim': 4}", "linear, cosine")),
        ("cosine", ("'cosine'", "mapping")),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ConfigError) as error:
        build_router(4, 4, options)
    assert all(word in str(error.value) for word in words)
