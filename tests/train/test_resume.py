from __future__ import annotations

import pytest
import torch
from toy_task import toy_config

from mhmoe_vl.config import dump
from mhmoe_vl.errors import CheckpointError, ConfigError
from mhmoe_vl.train import checkpoint, resume


def run_folder(path, steps=(1,), **options):
    config = toy_config(path, **options)
    for step in steps:
        state = {"step": step}
        checkpoint.save(path / "checkpoints", {"model": {"w": torch.ones(2)}}, state, dump(config))
    resume.write_config(path / "config.yaml", config)
    return config


def test_auto_starts_anew_or_goes_on(tmp_path):
    assert resume.starting_point(tmp_path, toy_config(tmp_path), print) is None
    config = run_folder(tmp_path, (3, 7))
    assert resume.starting_point(tmp_path, config, print).state["step"] == 7


@pytest.mark.parametrize("how", ["never", "elsewhere"])
def test_a_used_folder_is_only_continued_by_auto(tmp_path, how):
    run_folder(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds a run already, and train.resume is '{how}'"):
        resume.starting_point(tmp_path, toy_config(tmp_path, train__resume=how), print)


def test_a_path_names_a_run_or_a_checkpoint(tmp_path):
    run_folder(tmp_path / "old", (3, 7))
    for path, step in ((tmp_path / "old", 7), (tmp_path / "old/checkpoints/previous", 3)):
        config = toy_config(tmp_path / "new", train__resume=str(path), optim__lr=0.5)
        assert resume.starting_point(tmp_path / "new", config, print).state["step"] == step
    config = toy_config(tmp_path / "new", train__resume=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing: no checkpoint there"):
        resume.starting_point(tmp_path / "new", config, print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": {"embed_dim": 96}}, "encoder.embed_dim: 192 in the run to continue, 96 now"),
        ({"seed": 5}, "seed: 0 in the run to continue, 5 now"),
        ({"optim__lr": 0.5}, "optim.lr: 0.01 in the run to continue, 0.5 now"),
        ({"train__ema_decay": 0.5}, "train.ema_decay: 0.0 in the run to continue, 0.5 now"),
    ],
)
def test_changes_that_make_another_run_are_refused(tmp_path, options, message):
    run_folder(tmp_path, encoder={})
    options = {"encoder": {}} | options
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        resume.starting_point(tmp_path, toy_config(tmp_path, **options), print)


def test_harmless_changes_are_allowed(tmp_path):
    run_folder(tmp_path)
    options = {"steps": 99, "log_every": 7, "eval_every": 3, "save_every": 2, "num_workers": 3, "accumulate": 2}
    changed = toy_config(tmp_path / "x", **{f"train__{name}": value for name, value in options.items()})
    assert resume.starting_point(tmp_path, changed, print).state["step"] == 1
