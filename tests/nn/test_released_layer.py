"""The released MH-MoE layer: same weights, same inputs, its outputs and its balance loss."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mhmoe_vl.nn.mh_moe import MultiHeadMoE

ROUTERS = {
    "softmax": {"kind": "linear"},
    "xmoe": {
        "kind": "cosine",
        "dim": 16,
        "normalize_rows": False,
        "learned_temperature": False,
        "initial_temperature": 1.0,
    },
}


def translate(weights):
    """Our names and layout for the released layer's weights."""
    state = {}
    for kind in ("weight", "bias"):
        state[f"head_proj.{kind}"] = weights[f"multi_heads.{kind}"]
        state[f"merge_proj.{kind}"] = weights[f"out_proj.{kind}"]
        for fc in ("fc1", "fc2"):
            stacked = torch.stack([weights[f"experts.{e}.{fc}.{kind}"] for e in range(6)])
            state[f"routed.experts.{fc}_{kind}"] = stacked.mT if kind == "weight" else stacked
    if "gate.wg" in weights:
        state["routed.router.embedding"] = weights["gate.wg"]
        state["routed.router.proj.weight"] = weights["gate.wg_reduction.weight"]
    else:
        state["routed.router.weight"] = weights["gate.wg.weight"]
    return state


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_and_balance_loss(data_dir, router, training):
    folder = data_dir / "mh_moe_official" / router
    case = load_file(folder / "case.safetensors")
    layer = MultiHeadMoE(
        48, num_subtokens=4, num_experts=6, top_k=2, hidden_dim=40, normalize_gates=False, router=ROUTERS[router]
    ).train(training)
    layer.load_state_dict(translate(load_file(folder / "weights.safetensors")))
    output = layer(case["x"])
    largest = case["y"].abs().max().item()
    assert (output.x - case["y"]).abs().max().item() <= 1e-5 * largest
    assert output.aux_losses["balance_loss"].item() == pytest.approx(case["balance_loss"].item(), abs=1e-6)
