from __future__ import annotations

import pytest
import torch
from toy_task import BATCH, ToyTask, in_ranks, samples, toy_config

from mhmoe_vl import distributed
from mhmoe_vl.train.engine import session
from mhmoe_vl.train.step import Trainer

CPU = torch.device("cpu")


def trainer_and_parts(tmp_path, accumulate=1, **options):
    torch.manual_seed(0)
    task = ToyTask(accumulate=accumulate)
    trainer = Trainer(task, task.model(None), toy_config(tmp_path, **options), CPU)
    trainer.distribute()
    return trainer, task.dataset("train")[0]


def test_counts_are_those_of_all_parts(tmp_path):
    trainer, parts = trainer_and_parts(tmp_path, accumulate=4)
    parts[1].bad["image"] = 3
    parts[2].images = torch.zeros(5, 1)
    counts = trainer.count(parts)
    labels = sum(int((part.label >= 0).sum()) for part in parts)
    assert counts.targets == {"label": labels, "never": 0, "y": BATCH * 6}
    assert (counts.samples, counts.bad, counts.images) == ([2, 2, 2, 2], 3, 5)


def test_auxiliary_losses_are_means_over_parts(tmp_path):
    trainer, parts = trainer_and_parts(tmp_path, accumulate=4, optim__balance_loss_weight=0.5, optim__clip_grad=None)
    model = trainer.model
    balance = torch.stack([model(part).aux_losses["balance_loss"] for part in parts]).mean()
    terms = torch.stack([model(part).values["y"].square().sum() for part in parts]).sum() / (BATCH * 6)
    gradients = torch.autograd.grad(terms + 0.5 * balance, [model.router.weight, model.experts])
    expected = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    trainer.task.loss = lambda output, batch: {"y": output.values["y"].square().sum()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("router.weight", "experts"))
    trainer.parameters = [model.router.weight, model.experts]
    values = trainer.update(0, parts, trainer.count(parts), logged=True).values
    assert values["balance_loss"] == pytest.approx(float(balance.detach()))
    assert values["loss"] == pytest.approx(float((terms + 0.5 * balance).detach()))
    assert values["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_a_step_without_any_sample_is_left_out(tmp_path):
    trainer, _ = trainer_and_parts(tmp_path)
    empty = [samples([])]
    before = trainer.model.experts.clone()
    done = trainer.update(0, empty, trainer.count(empty), logged=True)
    assert done.not_finite == ["no samples"] and done.values["loss"] == 0.0
    assert torch.equal(before, trainer.model.experts)


def test_a_parameter_without_gradient_has_a_zero_one(tmp_path):
    """As it has under data-parallel training: AdamW moves it by its weight decay either way."""
    trainer, parts = trainer_and_parts(tmp_path, optim__weight_decay=0.5, optim__lr=0.1)
    trainer.task.loss = lambda output, batch: {"y": output.values["y"].sum()}
    before = trainer.model.classifier.weight.detach().clone()
    assert not trainer.update(0, parts, trainer.count(parts), logged=False).not_finite
    torch.testing.assert_close(trainer.model.classifier.weight, before * (1 - 0.5 * 0.05))


def test_compile_keeps_the_names_of_weights(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    trainer, _ = trainer_and_parts(tmp_path, train__compile=True)
    assert compiled == [trainer.model]


def test_two_ranks_average_to_the_gradient_of_the_whole_batch(tmp_path):
    alone, parts = trainer_and_parts(tmp_path, optim__clip_grad=None)
    expected = alone.update(0, parts, alone.count(parts), logged=True).values

    def check() -> int:
        with session(toy_config(tmp_path).train):
            trainer, parts = trainer_and_parts(tmp_path, optim__clip_grad=None)
            counts = trainer.count(parts)
            assert counts.samples == [BATCH] and len(parts[0]) == BATCH // distributed.world_size()
            values = trainer.update(0, parts, counts, logged=True).values
            for name in ("loss", "grad_norm", "balance_loss", "loss/label"):
                torch.testing.assert_close(values[name], expected[name], rtol=1e-6, atol=0)
            for name, weight in trainer.model.state_dict().items():
                torch.testing.assert_close(weight, alone.model.state_dict()[name])
        return 0

    assert in_ranks(check) == [0, 0]


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "gradient of classifier.weight"), (1e30, "norm of all")])
def test_only_what_is_not_finite_is_named(tmp_path, value, said):
    """Clipping, on by default, would spread a NaN over all gradients; a norm may overflow where no gradient does."""
    trainer, parts = trainer_and_parts(tmp_path)
    trainer.model.classifier.weight.register_hook(lambda grad: torch.full_like(grad, value))
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    [name] = trainer.update(0, parts, trainer.count(parts), logged=False).not_finite
    assert name.startswith(said)
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))
