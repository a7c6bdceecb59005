from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.train import system


def test_seeds_depend_on_every_number_and_on_nothing_else():
    def draws(*numbers):
        system.seed_all(*numbers)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    seen = [draws(0, 0, 0), draws(1, 0, 0), draws(0, 1, 0), draws(0, 0, 1)]
    assert all(len(set(column)) == 4 for column in zip(*seen, strict=True))
    assert draws(0, 0, 0) == seen[0]


@pytest.mark.parametrize("number", system.StopSignals.HANDLED)
def test_the_first_signal_is_noted_and_the_second_is_left_to_the_system(number):
    before = signal.getsignal(number)
    with system.StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert all(signal.getsignal(handled) == signal.SIG_DFL for handled in signals.HANDLED)
    assert signal.getsignal(number) == before


def test_a_run_folder_has_one_trainer(tmp_path):
    run_dir = tmp_path / "run"
    with system.lock(run_dir), pytest.raises(ConfigError, match="another process trains in"), system.lock(run_dir):
        pass
    with system.lock(run_dir):
        pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"output_dir: .*file/run: Not a directory"
    with pytest.raises(ConfigError, match=message), system.lock(tmp_path / "file" / "run"):
        pass


def test_precision_follows_the_configuration(monkeypatch):
    cpu = torch.device("cpu")
    assert system.uses_bfloat16("bfloat16", cpu) and not system.uses_bfloat16("float32", cpu)
    for capabilities, expected in (({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert system.uses_bfloat16("auto", cpu) is expected


def test_malloc_thresholds_can_be_raised_anywhere():
    system.raise_malloc_thresholds()
    assert torch.zeros(2**24).sum() == 0
