from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from toy_task import ToyModel

from mhmoe_vl.config import OptimConfig
from mhmoe_vl.errors import CheckpointError, ConfigError
from mhmoe_vl.train import optim


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]), ("linear", [1, 0.75, 0.5, 0.25, 0])],
)
def test_learning_rate_by_hand(schedule, decay):
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=2, schedule=schedule)
    assert [optim.learning_rate(step, 7, config) for step in range(7)] == pytest.approx([0.5, 1.0, *decay])


def test_learning_rate_in_steps_falls_as_vitdets():
    """Of 184,375 updates; the released configuration falls at 163,889 and 177,546."""
    config = OptimConfig(lr=1.0, warmup_steps=250, schedule="steps")
    ends = {0: 1 / 250, 249: 1, 250: 1, 163_888: 1, 163_889: 0.1, 177_546: 0.1, 177_547: 0.01, 184_374: 0.01}
    for step, rate in ends.items():
        assert optim.learning_rate(step, 184_375, config) == pytest.approx(rate)


def test_learning_rate_ends_at_min_lr_and_survives_short_runs():
    config = OptimConfig(lr=1.0, min_lr=0.1)
    assert optim.learning_rate(99, 100, config) == pytest.approx(0.1)
    assert optim.learning_rate(0, 1, config) == 1.0
    assert optim.learning_rate(3, 4, OptimConfig(lr=1.0, warmup_steps=10)) == pytest.approx(0.4)


def groups_by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_vectors_and_named_parameters_are_not_decayed():
    model = nn.Sequential(nn.Linear(2, 2), ToyModel(0.0))  # whose experts are 3-D but spared, below a prefix
    groups = groups_by_name(model, optim.param_groups(model, OptimConfig(weight_decay=0.3)))
    assert groups.keys() == dict(model.named_parameters()).keys()
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    assert decayed == {"0.weight", "1.router.weight", "1.classifier.weight", "1.extra.weight"}
    assert {group["weight_decay"] for name, group in groups.items() if name not in decayed} == {0.0}


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.head = nn.Linear(2, 2)

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}


def test_layer_decay_by_hand():
    model = Layered()
    groups = groups_by_name(model, optim.param_groups(model, OptimConfig(layer_decay=0.5)))
    scales = {name.removesuffix(".weight"): group["lr_scale"] for name, group in groups.items() if "weight" in name}
    assert scales == {"head": 1.0, "blocks.1": 0.5, "blocks.0": 0.25, "stem": 0.125}
    optimizer = optim.build_optimizer(model, OptimConfig(layer_decay=0.5))
    optim.set_learning_rate(optimizer, 0.8)
    assert {group["lr"] for group in optimizer.param_groups} == {0.8, 0.4, 0.2, 0.1}


def test_layer_decay_needs_layers():
    with pytest.raises(ConfigError, match=r"optim.layer_decay: 0.5 for Linear"):
        optim.param_groups(nn.Linear(2, 2), OptimConfig(layer_decay=0.5))


class Headed(nn.Module):
    """An encoder with layers, one of them called head, a head of its own, and a norm as deep as the stem that is in
    neither of them, whatever its name begins with."""

    def __init__(self):
        super().__init__()
        self.encoder = Layered()
        self.head_norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        for layer in (self.encoder.stem, *self.encoder.blocks, self.encoder.head, self.head_norm, self.head):
            x = layer(x)
        return x

    def group_matcher(self, coarse=False):
        return {"stem": r"^(?:encoder\.stem|head_norm)", "blocks": r"^encoder\.blocks\.(\d+)"}


@pytest.mark.parametrize(
    ("layer_decay", "scales"),
    [
        (1.0, {"stem": 1, "blocks.0": 1, "blocks.1": 1, "head": 1}),
        (0.65, {"stem": 0.65**3, "blocks.0": 0.65**2, "blocks.1": 0.65, "head": 1}),
    ],
)
def test_head_learning_rate_by_hand(layer_decay, scales):
    model = Headed()
    optimizer = optim.build_optimizer(
        model, OptimConfig(layer_decay=layer_decay, head_lr_factor=20.0, weight_decay=0.3)
    )
    optim.set_learning_rate(optimizer, 0.1)
    expected = {f"encoder.{layer}": 0.1 * scale for layer, scale in scales.items()}
    expected |= {"head_norm": 0.1 * scales["stem"], "head": 0.1 * 20}
    groups = groups_by_name(model, optimizer.param_groups)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        layer, _, kind = name.rpartition(".")
        assert group["lr"] == pytest.approx(expected[layer]), name
        assert group["weight_decay"] == (0.3 if kind == "weight" and layer != "head_norm" else 0.0), name


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_without_a_factor_the_groups_are_timms(layer_decay):
    model = Headed()
    spared = {"weight_decay": 0.05, "no_weight_decay_list": ()}
    if layer_decay == 1:
        expected = timm.optim.param_groups_weight_decay(model, **spared)
    else:
        expected = timm.optim.param_groups_layer_decay(model, **spared, layer_decay=layer_decay)
    groups = optim.param_groups(model, OptimConfig(layer_decay=layer_decay, head_lr_factor=1.0))
    assert [list(map(id, group.pop("params"))) for group in groups] == [
        list(map(id, group.pop("params"))) for group in expected
    ]
    assert groups == expected


def test_a_head_factor_needs_a_head():
    with pytest.raises(
        ConfigError, match=r"optim.head_lr_factor: 20.0 for Linear, which has no parameters in a submod"
    ):
        optim.param_groups(nn.Linear(2, 2), OptimConfig(head_lr_factor=20.0))


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    model(torch.randn(5, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_state_travels_as_tensors():
    models = [nn.Linear(2, 3), nn.Linear(2, 3)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (optim.build_optimizer(model, OptimConfig()) for model in models)
    step(models[0], first, 0)
    models[1].load_state_dict(models[0].state_dict())
    tensors = optim.optimizer_tensors(models[0], first)
    assert tensors.keys() == {f"{n}:{k}" for n in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")}
    optim.load_optimizer_tensors(models[1], second, {name: value.clone() for name, value in tensors.items()})
    for model, optimizer in zip(models, (first, second), strict=True):
        step(model, optimizer, 1)
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("config", [OptimConfig(head_lr_factor=20.0), OptimConfig(layer_decay=0.65)])
def test_optimizer_state_goes_by_names_not_by_groups(config):
    models = [Headed(), Headed()]
    first = optim.build_optimizer(models[0], OptimConfig())
    second = optim.build_optimizer(models[1], config)
    step(models[0], first, 0)
    tensors = optim.optimizer_tensors(models[0], first)
    assert len(tensors) == 3 * len(list(models[0].parameters()))
    optim.load_optimizer_tensors(models[1], second, {name: value.clone() for name, value in tensors.items()})
    again = optim.optimizer_tensors(models[1], second)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    for name, parameter in models[1].named_parameters():
        assert torch.equal(second.state[parameter]["exp_avg"], tensors[f"{name}:exp_avg"])


def test_foreign_optimizer_state_is_refused():
    model = nn.Linear(2, 3)
    optimizer = optim.build_optimizer(model, OptimConfig())
    with pytest.raises(CheckpointError, match=r"'weight:exp_avg' \(3, 5\) fits no parameter"):
        optim.load_optimizer_tensors(model, optimizer, {"weight:exp_avg": torch.zeros(3, 5)})


@pytest.mark.parametrize(("clip", "factor"), [(None, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_clipping_by_hand(clip, factor):
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    norm = optim.gradient_norm(parameters)
    assert float(norm) == 5.0
    optim.clip_gradients(parameters, norm, clip)
    assert [float(parameter.grad) for parameter in parameters] == pytest.approx([3 * factor, 4 * factor])
