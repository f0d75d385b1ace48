"""Schedules are functions of the step alone: warm-up, cosine, warm-up-stable-decay.

In: small configurations. Out: the learning rate of each step, as the papers have it.
"""

import math
from dataclasses import replace

import pytest
from train_builders import tiny_run

from prep.settings import ConfigError
from train.config import OptimConfig
from train.schedule import average_decay, lr_factor

WSD = OptimConfig(schedule="wsd", num_steps=100, warmup_steps=10, decay_steps=40, final_lr_fraction=0.1)


def test_every_schedule_warms_up_by_equal_steps() -> None:
    for config in (WSD, OptimConfig(num_steps=100, warmup_steps=10)):
        assert [lr_factor(step, config) for step in range(10)] == pytest.approx([0.1 * n for n in range(1, 11)])


def test_cosine_goes_from_the_peak_to_the_final_share() -> None:
    config = OptimConfig(num_steps=110, warmup_steps=10, final_lr_fraction=0.2)
    assert lr_factor(10, config) == 1.0
    assert lr_factor(60, config) == pytest.approx(0.6)
    assert lr_factor(110, config) == lr_factor(500, config) == pytest.approx(0.2)


def test_wsd_stays_at_the_peak_and_then_decays_as_one_less_a_root() -> None:
    assert {lr_factor(step, WSD) for step in range(10, 61)} == {1.0}
    for step in (61, 70, 99):
        assert lr_factor(step, WSD) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt((step - 60) / 40)))
    assert lr_factor(100, WSD) == pytest.approx(0.1)


def test_wsd_without_a_decay_stays_and_its_branch_is_the_same_until_it_decays() -> None:
    trunk = replace(WSD, decay_steps=0)
    assert {lr_factor(step, trunk) for step in range(10, 100)} == {1.0}
    assert [lr_factor(step, trunk) for step in range(61)] == [lr_factor(step, WSD) for step in range(61)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay_steps": 5}, r"decay_steps = 5 is of schedule wsd, and this is cosine\. Set schedule=wsd"),
        ({"schedule": "wsd", "decay_steps": 9}, r"decay_steps = 9 and warmup_steps = 2 do not fit into num_steps = 10"),
        ({"schedule": "wsd", "decay_steps": -1}, r"decay_steps = -1 and warmup_steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(**wrong)


def test_an_average_forgets_quickly_at_first_and_slowly_later() -> None:
    config = OptimConfig(average_steps=50)
    kept = [average_decay(step, config) for step in range(1000)]
    assert kept[0] == 0.1 and kept == sorted(kept) and kept[-1] == 1 - 1 / 50
