"""Learning-rate factors against their definitions, and at their ends."""

import math

import pytest

from megashear.config.training_schema import OptimizerConfig
from megashear.train.learning_rate import learning_rate_factor


def test_cosine() -> None:
    optimizer = OptimizerConfig(warmup_steps=4, min_ratio=0.1)
    found = [learning_rate_factor(step, 20, optimizer, 0.5) for step in range(20)]
    assert found[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found[12] == pytest.approx(0.55)
    assert found[16] == pytest.approx(0.1 + 0.9 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] > 0.1


def test_warmup_stable_decay() -> None:
    optimizer = OptimizerConfig(schedule="wsd", warmup_steps=2, decay_steps=5, min_ratio=0.0)
    found = [learning_rate_factor(step, 12, optimizer, 0.5) for step in range(12)]
    assert found == pytest.approx([0.0, 0.5, 1, 1, 1, 1, 1, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_an_open_decay_gives_way_to_the_warm_up() -> None:
    optimizer = OptimizerConfig(schedule="wsd", warmup_steps=9, min_ratio=0.0)
    found = [learning_rate_factor(step, 10, optimizer, 0.5) for step in range(10)]
    assert found == pytest.approx([step / 9 for step in range(9)] + [1.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_lengths_left_open_are_shares(schedule: str) -> None:
    optimizer = OptimizerConfig(schedule=schedule)
    found = [learning_rate_factor(step, 100, optimizer, 0.1) for step in range(100)]
    assert found[5] == 0.5 and found[10] == 1.0
    if schedule == "wsd":
        assert found[80] == 1.0 and found[81] < 1.0
    assert learning_rate_factor(0, 5, OptimizerConfig(warmup_steps=0), 0.1) == 1.0
