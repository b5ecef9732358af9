"""When masks close: together or one after another, how fast they sharpen, when they settle; all follows the steps."""

import math

import pytest

from megashear.config.training_schema import BatchConfig, PruneConfig
from megashear.masks.mask_specs import mask_specs
from megashear.masks.sparsity_schedule import SparsitySchedule


@pytest.fixture
def specs(source, target):
    return tuple(mask_specs(source, target))


def closing(specs, **keys):
    published = {"constraint": "lagrangian", "sharpening": 1.0, "freeze_steps": 0}
    return SparsitySchedule(PruneConfig(batch=BatchConfig(steps=100), **(published | keys)), specs)


def test_lengths_follow_the_number_of_steps(specs):
    published, ours = closing(specs), closing(specs, constraint="projected", freeze_steps=None)
    assert (published.warmup_steps, published.freeze_step) == (20, 100)
    assert (ours.warmup_steps, ours.freeze_step) == (50, 90)
    assert not any(published.is_frozen(step) for step in range(101))
    assert [ours.is_frozen(step) for step in (0, 89, 90, 100)] == [False, False, True, True]
    longer = SparsitySchedule(PruneConfig(batch=BatchConfig(steps=3200), constraint="lagrangian"), specs)
    assert longer.warmup_steps == 640 and longer.rates() == (1.0, 1.0)
    assert closing(specs, constraint="projected").rates() == (1 / 32, 32.0)
    assert closing(specs).rates() == (pytest.approx(16 * math.log(100) / 100), 32.0)
    assert closing(specs, log_alpha_limit=None).rates()[0] == pytest.approx(16 * 5 / 100)
    assert closing(specs, mask_learning_rate=0.5, lambda_learning_rate=2.0).rates() == (0.5, 2.0)


def test_what_is_left_open_gives_way_to_what_is_set(specs):
    """Masks never settle before their targets are reached: 90 settled steps of 100 leave 10 to close in, and so on."""
    ours = {"constraint": "projected", "freeze_steps": None}
    assert closing(specs, **ours | {"freeze_steps": 90}).warmup_steps == 10
    assert closing(specs, **ours, sparsity_warmup_steps=95).freeze_step == 95
    for keys in ({"freeze_steps": 90}, {"sparsity_warmup_steps": 95}):
        schedule = closing(specs, **ours | keys)
        full = {s.name: s.target_sparsity for s in specs}
        assert schedule.targets(schedule.freeze_step) == pytest.approx(full)


def test_granularities_close_together_by_default(specs):
    schedule = closing(specs, sparsity_warmup_steps=40)
    for step, share in ((0, 0.0), (10, 0.25), (40, 1.0), (99, 1.0)):
        assert schedule.targets(step) == pytest.approx({s.name: share * s.target_sparsity for s in specs})


def test_granularities_close_one_after_another_in_the_order_asked_for(specs):
    names = [s.name for s in specs]
    assert names == ["hidden", "group", "intermediate", "layer"]
    schedule = closing(specs, sparsity_warmup_steps=40, granularity_order=["layer", "group"])
    shares = {s.name: [schedule.targets(step)[s.name] / s.target_sparsity for step in range(0, 50, 5)] for s in specs}
    assert shares["layer"] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1])
    assert shares["group"] == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1, 1, 1])
    assert shares["hidden"] == pytest.approx([0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1])
    assert shares["intermediate"] == pytest.approx([0, 0, 0, 0, 0, 0, 0, 0.5, 1, 1])


def test_sharpening_multiplies_up_until_masks_settle(specs):
    schedule = closing(specs, sharpening=10.0, freeze_steps=20)
    assert schedule.sharpening_factor() ** 80 == pytest.approx(10.0)
    assert closing(specs).sharpening_factor() == 1.0


def test_half_closed_is_half_of_the_final_target_in_each_granularity(specs):
    one, half = closing(specs), {spec.name: spec.target_sparsity / 2 for spec in specs}
    assert one.at_half_target(50, half)
    for name in half:
        assert not one.at_half_target(50, half | {name: half[name] - 1e-3}), name


def test_while_the_schedule_asks_for_less_than_half_the_device_is_not_waited_for(specs):
    one = closing(specs, sparsity_warmup_steps=40)
    assert not one.at_half_target(19, {})  # nothing is read of it
    assert one.at_half_target(20, {spec.name: spec.target_sparsity / 2 for spec in specs})
