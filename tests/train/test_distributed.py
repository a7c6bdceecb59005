"""mhmoe_vl.distributed, in one process and between two or three."""

from __future__ import annotations

import pytest
import torch
from toy_task import in_ranks

from mhmoe_vl import distributed
from mhmoe_vl.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")


def between_ranks(check, world: int) -> None:
    def run() -> int:
        distributed.init_process_group(CPU)
        try:
            check(distributed.rank())
        finally:
            distributed.shutdown()
        return 0

    assert in_ranks(run, world) == [0] * world


def test_alone_everything_is_local():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2)
    assert distributed.all_reduce_sum(x) is x
    assert distributed.gather_bytes(b"ab") == [b"ab"]
    assert distributed.broadcast_json({"a": 1}) == {"a": 1}
    assert distributed.broadcast_tensors({"a": x}) == {"a": x}
    assert distributed.max_over_ranks(3) == 3
    distributed.init_process_group(CPU)  # nothing to join
    distributed.shutdown()


def test_records_pass_through_json_alone_too():
    assert distributed.gather_records([{"id": 1, "box": (1, 0.1 + 0.2)}]) == [{"id": 1, "box": [1, 0.1 + 0.2]}]


def test_errors_on_main_are_raised_alone_too():
    with pytest.raises(ConfigError, match=r"^x$"):
        distributed.on_main(lambda: (_ for _ in ()).throw(ConfigError("x")))


def test_records_of_uneven_ranks_come_in_order():
    """Nothing on the first, and one far longer than the others."""

    def check(rank: int) -> None:
        mine = [[], [{"id": 1, "text": "é" * 5000, "x": 1 / 3}], [{"id": 2}, {"id": 3}]][rank]
        found = distributed.gather_records(mine)
        assert found == [{"id": 1, "text": "é" * 5000, "x": 1 / 3}, {"id": 2}, {"id": 3}]

    between_ranks(check, 3)


def test_sum_and_its_gradient_by_hand():
    """y = (x_0 + x_1)^2 on both ranks: dy/dx_r = 2 (x_0 + x_1), and each rank's y counts."""

    def check(rank: int) -> None:
        x = torch.tensor([1.0, 2.0])[rank].requires_grad_()
        total = distributed.all_reduce_sum(x)
        total.square().backward()
        assert (float(total.detach()), float(x.grad)) == (3.0, 2 * 2 * 3.0)
        with distributed.independent():
            assert distributed.all_reduce_sum(x) is x
        assert float(distributed.all_reduce_sum(x.detach())) == 3.0

    between_ranks(check, 2)


def test_rank_0_speaks_for_all():
    def check(rank: int) -> None:
        assert distributed.broadcast_json([rank, "a"]) == [0, "a"]
        mine = {"w": torch.arange(6).reshape(2, 3), "h": torch.ones(0).bfloat16(), "n": torch.tensor(2.5)}
        found = distributed.broadcast_tensors(mine if rank == 0 else {})
        assert found.keys() == mine.keys()
        for name, value in mine.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
        assert distributed.max_over_ranks(rank * 5) == 5
        assert distributed.on_main(lambda: rank) == 0

        def fail() -> None:
            raise CheckpointError("gone")

        with pytest.raises(CheckpointError, match=r"^gone$"):
            distributed.on_main(fail)

    between_ranks(check, 2)


@pytest.mark.parametrize("name", ["cuda:99", "toaster"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ConfigError, match=f"train.device: .*{name}"):
        distributed.select_device(name)
    assert distributed.select_device("cpu") == CPU


def test_devices_to_train_on():
    assert distributed.select_device("cpu") == CPU
    assert distributed.select_device("auto").type in ("cpu", "cuda")
    for name in ("meta", "mps", "xpu", "tpu", "", "cuda:x", "cuda:-1", "cuda:99999999999"):
        with pytest.raises(ConfigError, match=r"^train\.device: "):
            distributed.select_device(name)
    with pytest.raises(ConfigError, match="cuda:77 is not among"):
        distributed.select_device("cuda:77")
