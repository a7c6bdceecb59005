from __future__ import annotations

from mhmoe_vl.train.alarms import REMEMBERED, CollapseAlarm, SpikeAlarm


def test_a_share_above_four_times_the_even_one_is_told_once_and_again_after_a_recovery():
    alarm = CollapseAlarm({})
    high, low = {"load/blocks.1": [0.1, 0.6] + [0.05] * 6}, {"load/blocks.1": [0.125] * 8}
    count, [text] = alarm.check(10, high)
    assert count == 1 and text.startswith("blocks.1: expert 1 gets 60% of all choices")
    assert alarm.check(20, high) == (1, [])
    assert alarm.check(30, low) == (0, [])
    assert alarm.check(40, high) == (1, [text])


def test_dead_experts_are_named_and_the_count_goes_through_a_stop():
    last_used: dict[str, list[int]] = {}
    shares = {"load/a": [0.5, 0.0, 0.5, 0.0]}
    assert CollapseAlarm(last_used).check(50, shares) == (0, [])
    assert CollapseAlarm(last_used).check(1049, shares) == (0, [])
    count, [text] = CollapseAlarm(last_used).check(1050, shares)
    assert count == 1 and text.startswith("a: no choice in 1000 steps for expert 1, 3 (")
    assert last_used == {"a": [1050, 50, 1050, 50]}
    assert CollapseAlarm(last_used).check(1060, {"load/a": [0.25] * 4}) == (0, [])


def test_a_loss_over_ten_times_the_median_is_told():
    alarm = SpikeAlarm()
    assert [alarm.check(loss) for loss in (500.0, *[2.0] * 9, 19.9, float("nan"))] == [None] * 12
    assert alarm.check(20.1).startswith("loss 20.1, the median of the last 11 is 2 (")
    assert alarm.check(2.0) is None
    for _ in range(REMEMBERED):
        assert alarm.check(1.0) is None
    assert f"the median of the last {REMEMBERED} is 1 " in alarm.check(float("inf"))
