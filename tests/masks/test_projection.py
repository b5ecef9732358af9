"""The projected constraint: exact expected sparsity in every row, differences between units untouched."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.training_schema import BatchConfig, ImportanceConfig, PruneConfig
from megashear.masks.constraint import MIN_SPARSITY, expected_sparsity, project
from megashear.masks.mask_optimizer import build_mask_optimizer


@given(
    st.integers(1, 5), st.integers(1, 300), st.floats(MIN_SPARSITY, 0.999), st.floats(0.0, 300.0), st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_any_row_meets_any_target_and_keeps_its_differences(rows, units, sparsity, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    before = spread * torch.randn(rows, units, generator=generator, dtype=torch.float64) + spread
    after = project(before, sparsity)
    # sigmoid without its clip at 1e-6: the projection does not leak through it.
    found = torch.sigmoid(-1.5985967 - after).mean(-1)
    assert (found - sparsity).abs().max() < 1e-6
    shift = after - before
    assert (shift - shift[:, :1]).abs().max() <= 1e-10 * (1 + before.abs().max())


def state(source, target, **keys):
    chosen = {"constraint": "projected", "sparsity_warmup_steps": 20, "freeze_steps": 10, "sharpening": 1.0} | keys
    config = PruneConfig(batch=BatchConfig(steps=40), **chosen)
    return build_mask_optimizer(source, target, config, seed=3)


def walk(masks, steps):
    for step in steps:
        masks.zero_gradients()
        drawn = [
            mask for mask in vars(masks.masks.sample(0, step, 0)).values() if mask is not None and mask.requires_grad
        ]
        sum((mask**2).sum() for mask in drawn).backward()
        masks.add_constraint_gradients(step)
        masks.step(1.0, step)


def test_every_row_is_on_its_scheduled_target_at_every_step(source, target):
    masks = state(source, target, mask_learning_rate=0.3)
    for step in range(30):
        for spec in masks.masks.specs:
            wanted = max(masks.schedule.targets(step)[spec.name], MIN_SPARSITY)
            found = expected_sparsity(masks.masks.log_alpha[spec.name].detach().reshape(spec.rows, spec.units))
            assert (found - wanted).abs().max() < 1e-5, (step, spec.name)
        walk(masks, [step])
    assert all(not pair.any() for pair in masks.constraint.multipliers.values())


def test_settled_masks_are_the_target_exactly_and_stand_still(source, target):
    masks = state(source, target, mask_learning_rate=0.3, sharpening=4.0)
    walk(masks, range(30))
    before = {name: value.detach().clone() for name, value in masks.masks.log_alpha.items()}
    whole = masks.masks.deterministic("target")
    for step in range(30, 40):
        drawn = masks.masks.sample(9, step, 1)
        for name in ("hidden", "head", "intermediate", "layer"):
            mask = getattr(drawn, name)
            assert set(mask.detach().unique().tolist()) == {0.0, 1.0}, name
            assert torch.equal(mask.detach(), getattr(whole, name))
        walk(masks, [step])
    for spec in masks.masks.specs:
        assert torch.equal(masks.masks.log_alpha[spec.name], before[spec.name])
        kept = (masks.masks.log_alpha[spec.name] > 0).reshape(spec.rows, spec.units).sum(-1)
        assert (kept == spec.target_units).all()


def test_a_warm_start_takes_the_order_of_the_scores(source, target):
    masks = state(source, target, importance=ImportanceConfig(criterion="magnitude", spread=50.0))
    layers = masks.masks.log_alpha["layer"].detach().clone()
    scores = {s.name: torch.randn(s.shape) for s in masks.masks.specs if s.name != "layer"}
    masks.warm_start(scores)
    for name, score in scores.items():
        rows, units = (
            score.reshape(-1, score.shape[-1]),
            masks.masks.log_alpha[name].detach().reshape(-1, score.shape[-1]),
        )
        assert torch.equal(rows.argsort(-1), units.argsort(-1))
        ordered = units.sort(-1).values
        torch.testing.assert_close(ordered[:, -1] - ordered[:, 0], torch.full((len(units),), 100.0))
    assert torch.equal(masks.masks.log_alpha["layer"], layers)


@pytest.mark.parametrize("limit", [4.6, None])
def test_a_warm_start_under_multipliers_leaves_everything_open(source, target, limit):
    """Multipliers shift nothing: what started closed would be closed at once."""
    masks = state(source, target, constraint="lagrangian", log_alpha_limit=limit)
    scores = {s.name: torch.randn(s.shape) for s in masks.masks.specs}
    masks.warm_start(scores)
    for spec in masks.masks.specs:
        both = scores[spec.name], masks.masks.log_alpha[spec.name].detach()
        rows, units = (values.reshape(spec.rows, spec.units) for values in both)
        assert torch.equal(rows.argsort(-1), units.argsort(-1)), spec.name
        assert expected_sparsity(units).mean() < 0.03, spec.name


def test_a_skipped_step_does_not_keep_masks_from_settling(source, target):
    masks = state(source, target, mask_learning_rate=0.3)
    walk(masks, range(29))
    masks.skip(29)
    assert all((value.detach().abs() == 16.0).all() for value in masks.masks.log_alpha.values())
    before = {name: value.detach().clone() for name, value in masks.masks.log_alpha.items()}
    masks.skip(30)
    assert all(torch.equal(value, before[name]) for name, value in masks.masks.log_alpha.items())


def test_what_the_target_keeps_stays_open(source):
    """A granularity that is named but loses nothing is never closed; one that loses little never closes more."""
    target = dataclasses.replace(source, intermediate_size=95, hidden_size=60)
    masks = state(
        source, target, granularities=["hidden", "group", "intermediate", "layer"], granularity_order=["layer"]
    )
    assert masks.schedule.targets(10)["hidden"] == pytest.approx(masks.masks.specs[0].target_sparsity)
    walk(masks, range(29))
    for step in range(40):
        drawn = masks.masks.sample(3, step, 0)
        assert drawn.head is not None and (drawn.head == 1).all() and (drawn.layer == 1).all()
    thousand = dataclasses.replace(source, intermediate_size=11008)
    few = state(thousand, dataclasses.replace(thousand, intermediate_size=11000))
    assert expected_sparsity(few.masks.log_alpha["intermediate"]).max() < 1.01 * 8 / 11008


def test_what_was_open_when_masks_settle_is_told(source, target):
    vague = state(source, target, mask_learning_rate=0.0)  # all units of a row are alike: half of the kept are unsure
    walk(vague, range(29))
    assert vague.undecided == []
    walk(vague, [29])
    assert {text.split(":")[0] for text in vague.undecided} == {spec.name for spec in vague.masks.specs}
    sure = state(source, target, mask_learning_rate=0.0)
    walk(sure, range(29))
    with torch.no_grad():
        for spec in sure.masks.specs:
            rows = sure.masks.log_alpha[spec.name].view(spec.rows, spec.units)
            rows.copy_(torch.where(torch.arange(spec.units) < spec.target_units, 12.0, -12.0))
    walk(sure, [29])
    assert sure.undecided == []


def test_a_last_step_off_the_target_is_projected_before_it_is_judged(source, target):
    masks = state(source, target, mask_learning_rate=0.0)
    walk(masks, range(29))
    with torch.no_grad():
        for spec in masks.masks.specs:
            rows = masks.masks.log_alpha[spec.name].view(spec.rows, spec.units)
            rows.copy_(torch.where(torch.arange(spec.units) < spec.target_units, 20.0, -4.0) - 8.0)
            rows[:, spec.target_units] += 12.0  # open, until a shift closes it
    walk(masks, [29])
    assert masks.undecided == []


def test_equal_scores_keep_the_lower_index(source, target):
    masks = state(source, target)
    masks.warm_start({"hidden": torch.zeros(source.hidden_size)})
    assert (masks.masks.log_alpha["hidden"].detach().diff() < 0).all()


def test_sharpening_spreads_what_is_not_decided(source, target):
    plain, sharp = state(source, target), state(source, target, sharpening=8.0)
    for masks in (plain, sharp):
        masks.warm_start({"hidden": torch.arange(float(source.hidden_size))})
        for step in range(29):
            masks.step(0.0, step)
    ratio = (sharp.masks.log_alpha["hidden"].max() - sharp.masks.log_alpha["hidden"].min()) / (
        plain.masks.log_alpha["hidden"].max() - plain.masks.log_alpha["hidden"].min()
    )
    assert ratio.item() == pytest.approx(8.0 ** (29 / 30), rel=1e-4)
