"""Mask state: noise by step, gradients in one buffer, the published 24-step trace of multipliers, saving."""

import dataclasses

import pytest
import torch

from megashear import ops
from megashear.config.training_schema import BatchConfig, PruneConfig
from megashear.errors import CheckpointError
from megashear.masks.mask_optimizer import build_mask_optimizer
from megashear.masks.mask_values import assemble

LIMIT = 4.605170185988092


def published_config(**keys) -> PruneConfig:
    """The published constraint with the given keys; nothing sharpens and nothing settles."""
    plain = {"basis": "source", "constraint": "lagrangian", "sharpening": 1.0, "freeze_steps": 0, "lambda1_cap": None}
    return PruneConfig(**plain | keys)


def values_of(masks):
    assert masks.norm_gain is None
    return masks.hidden, masks.head, masks.intermediate, masks.layer


def set_log_alpha(state, values):
    with torch.no_grad():
        for name, value in values.items():
            state.masks.log_alpha[name].copy_(value)


def test_published_noise_gives_the_published_sample(published, source):
    """The published code takes the noise's logit (below 8 here) in fp32: 2^-23 * 8 of it, times a slope below 0.45."""
    noise, log_alpha = published.masks("B/eps"), published.masks("B/log_alpha_clamped")
    ours = assemble({name: ops.hard_concrete(log_alpha[name], noise[name]) for name in noise}, source)
    theirs = published.masks("B/zs")
    for value, name in zip(values_of(ours), ("hidden", "group", "intermediate", "layer"), strict=True):
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0.45 * 2**-23 * 8)


def test_multipliers_follow_the_published_24_steps(published, source, target):
    """Lagrangian gradients, joint clip, Adam with ascent and the schedule; log-alpha is set to the published one."""
    state = build_mask_optimizer(
        source,
        target,
        published_config(sparsity_warmup_steps=8, mask_learning_rate=1.0, lambda_learning_rate=1.0),
        seed=0,
        dtype=torch.float64,
    )
    trace, pairs = published.masks("F/log_alpha"), published.masks("F/lambda")
    before = published.masks("F/log_alpha_0")
    for step in range(24):
        set_log_alpha(state, {name: value.clamp(-LIMIT, LIMIT) for name, value in before.items()})
        state.zero_gradients()
        loss, info = state.add_constraint_gradients(step)
        assert loss.item() == pytest.approx(published["F/lag_loss"][step].item(), abs=1e-9)
        for name in trace:
            assert info["expected"][name].item() == pytest.approx(
                published.masks("F/expected")[name][step].item(), abs=1e-9
            )
            assert info["target"][name] == pytest.approx(published.masks("F/target")[name][step].item(), abs=1e-12)
        norm = published["F/grad_norm"][step].item()
        state.scale_gradients(min(1.0, 1.0 / (norm + 1e-6)))
        state.step(published["F/learning_rate_factor"][step].item(), step)
        for name, value in pairs.items():
            torch.testing.assert_close(state.constraint.multipliers[name].detach(), value[step], rtol=0, atol=1e-9)
        before = {name: value[step] for name, value in trace.items()}


def test_log_alpha_starts_by_seed_and_within_the_limit(source, target):
    config = published_config(log_alpha_init=0.0)
    one, same, other = (build_mask_optimizer(source, target, config, seed=seed).masks.log_alpha for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert one["intermediate"].std().item() == pytest.approx(0.01, rel=0.2)
    few = build_mask_optimizer(source, dataclasses.replace(source, hidden_size=40), config, seed=5).masks.log_alpha
    assert list(few) == ["hidden"] and torch.equal(few["hidden"], one["hidden"])
    published = build_mask_optimizer(source, target, published_config(), seed=5).masks.log_alpha
    assert all((value == torch.tensor(LIMIT)).all() for value in published.values())


def test_a_sample_is_a_function_of_seed_step_and_micro_batch(grouped_source, grouped_target):
    state = build_mask_optimizer(grouped_source, grouped_target, published_config(log_alpha_init=0.0), seed=1)
    first = values_of(state.masks.sample(3, 4, 5))
    again = values_of(state.masks.sample(3, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for others in ((2, 4, 5), (3, 3, 5), (3, 4, 4)):
        assert not torch.equal(first[0], state.masks.sample(*others).hidden)
    shapes = [tuple(value.shape) for value in first]
    assert shapes == [(16,), (3, 12), (3, 20), (3,)]


def test_a_head_is_its_group_times_its_query(grouped_source):
    group = torch.tensor([[0.0, 0.5, 1.0, 0.25]] * 3)
    query = torch.rand(3, 4, 3)
    both = assemble({"group": group, "query": query}, grouped_source).head
    for head in range(12):
        assert torch.equal(both[:, head], group[:, head // 3] * query[:, head // 3, head % 3])
    assert torch.equal(assemble({"query": query}, grouped_source).head, query.view(3, 12))
    assert torch.equal(assemble({"group": group}, grouped_source).head, group.repeat_interleave(3, 1))
    assert values_of(assemble({}, grouped_source)) == (None,) * 4


def test_gradients_add_up_in_one_buffer(grouped_source, grouped_target):
    state = build_mask_optimizer(
        grouped_source, grouped_target, published_config(log_alpha_init=0.0), seed=1, dtype=torch.float64
    )
    wanted = torch.zeros_like(state.gradients_flat())
    for micro_batch in range(2):
        masks = state.masks.sample(0, 0, micro_batch)
        loss = sum((mask**2).sum() for mask in values_of(masks))
        parts = torch.autograd.grad(loss, list(state.masks.log_alpha.values()), retain_graph=True)
        wanted += torch.cat([part.reshape(-1) for part in parts])
        loss.backward()
    torch.testing.assert_close(state.gradients_flat(), wanted, rtol=0, atol=1e-14)
    state.set_gradients_flat(2 * wanted)
    assert state.grad_norm_squared().item() == pytest.approx(4 * wanted.square().sum().item())
    loss, _ = state.constraint.loss(state.masks, 50)
    parts = torch.autograd.grad(loss, state.parameters())
    state.add_constraint_gradients(50)
    total = torch.cat([part.reshape(-1) for part in parts])
    total[: wanted.numel()] += 2 * wanted
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in state.parameters()]), total)
    state.scale_gradients(torch.tensor(0.5))
    assert state.grad_norm_squared().item() == pytest.approx(total.square().sum().item() / 4)
    state.zero_gradients()
    assert state.grad_norm_squared() == 0


def test_a_step_descends_ascends_and_keeps_its_limits(source, target):
    config = published_config(
        log_alpha_init=0.0,
        log_alpha_limit=0.5,
        lambda2_cap=0.25,
        mask_learning_rate=1.0,
        lambda_learning_rate=1.0,
        batch=BatchConfig(steps=50),
    )
    state = build_mask_optimizer(source, target, config, seed=0)
    assert state.schedule.warmup_steps == 10
    state.set_gradients_flat(torch.ones_like(state.gradients_flat()))
    for pair in state.constraint.multipliers.values():
        pair.grad.fill_(1.0)
    before = state.masks.log_alpha["hidden"].detach().clone()
    state.step(0.125, 0)
    torch.testing.assert_close(state.masks.log_alpha["hidden"].detach(), before - 0.125)
    torch.testing.assert_close(state.constraint.multipliers["hidden"].detach(), torch.full((2,), 0.125))
    for _ in range(9):
        state.step(0.125, 1)
    assert all((value == -0.5).all() for value in state.masks.log_alpha.values())
    assert all(pair[1] == 0.25 and pair[0] > 1 for pair in state.constraint.multipliers.values())


def test_learning_rates_are_the_configured_ones(source, target):
    config = published_config(log_alpha_init=0.0, mask_learning_rate=0.1, lambda_learning_rate=0.3)
    state = build_mask_optimizer(source, target, config, seed=0)
    before = state.masks.log_alpha["layer"].detach().clone()
    state.set_gradients_flat(torch.ones_like(state.gradients_flat()))
    state.constraint.multipliers["layer"].grad.fill_(-1.0)
    state.step(1.0, 0)
    torch.testing.assert_close(state.masks.log_alpha["layer"].detach(), before - 0.1)
    torch.testing.assert_close(state.constraint.multipliers["layer"].detach(), torch.full((2,), -0.3))


def train(state, steps):
    for step in steps:
        state.zero_gradients()
        sum((mask**2).sum() for mask in values_of(state.masks.sample(0, step, 0))).backward()
        state.add_constraint_gradients(step)
        state.step(0.1, step)


def test_a_saved_state_goes_on_bit_for_bit(grouped_source, grouped_target):
    whole = build_mask_optimizer(grouped_source, grouped_target, published_config(), seed=0)
    train(whole, range(4))
    saved = whole.state_dict()
    train(whole, range(4, 8))
    resumed = build_mask_optimizer(grouped_source, grouped_target, published_config(), seed=9)
    resumed.load_state_dict(saved)
    train(resumed, range(4, 8))
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and int(ours["adam_steps"]) == 8
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_fresh_state_survives_saving(source, target):
    fresh, other = (
        build_mask_optimizer(source, target, published_config(log_alpha_init=0.0), seed=seed) for seed in (0, 1)
    )
    other.load_state_dict(fresh.state_dict())
    train(fresh, range(2))
    train(other, range(2))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_another_runs_state_is_refused(source, target, grouped_source, grouped_target):
    saved = build_mask_optimizer(grouped_source, grouped_target, published_config(), seed=0).state_dict()
    state = build_mask_optimizer(source, target, published_config(), seed=0)
    before = state.state_dict()
    with pytest.raises(CheckpointError, match=r"log_alpha\.query"):
        state.load_state_dict(saved)
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())


def test_deterministic_masks_by_target_and_by_expectation(grouped_source, grouped_target):
    state = build_mask_optimizer(grouped_source, grouped_target, published_config(log_alpha_init=0.0), seed=0)
    masks = state.masks.deterministic()
    assert not masks.hidden.requires_grad
    assert [(masks.hidden != 0).sum(), (masks.layer != 0).sum()] == [10, 2]
    assert (masks.head != 0).sum(1).tolist() == [6] * 3
    open_state = build_mask_optimizer(grouped_source, grouped_target, published_config(), seed=0)
    assert all((mask != 0).all() for mask in values_of(open_state.masks.deterministic("expected")))
    with pytest.raises(ValueError, match="target or expected"):
        state.masks.deterministic("other")


@pytest.mark.parametrize("steps", [100, 200, 400])
def test_multipliers_reach_their_targets_in_short_phases(source, target, steps):
    """By derived rates and the default cap, where nothing of the data pulls."""
    state = build_mask_optimizer(
        source, target, PruneConfig(constraint="lagrangian", batch=BatchConfig(steps=steps)), seed=0
    )
    generator = torch.Generator().manual_seed(steps)
    state.warm_start({spec.name: torch.randn(spec.shape, generator=generator) for spec in state.masks.specs})
    ahead = 0.0
    for step in range(steps):
        state.zero_gradients()
        _, info = state.add_constraint_gradients(step)
        ahead = max(ahead, *(float(info["expected"][name]) - info["target"][name] for name in info["target"]))
        state.step(1.0, step)
    assert ahead < 0.2
    assert not [said for said in state.undecided if "expected closed" in said], state.undecided


def test_the_cap_holds_the_linear_multiplier_on_both_sides(source, target):
    state = build_mask_optimizer(source, target, published_config(lambda1_cap=0.5, lambda_learning_rate=2.0), seed=0)
    for gap in (-1.0, 1.0):
        for pair in state.constraint.multipliers.values():
            pair.grad.copy_(torch.tensor([gap, 0.0]))
        for step in range(8):
            state.step(1.0, step)
        assert all(pair[0].item() == pytest.approx(0.5 * gap) for pair in state.constraint.multipliers.values())


def test_masks_stand_alone_by_granularity(grouped_source, grouped_target):
    """Those that are learned, groups apart from queries; together they are the sample."""
    state = build_mask_optimizer(grouped_source, grouped_target, PruneConfig(), seed=0)
    whole, parts = state.masks.sample(1, 2, 3), state.masks.single_granularity_masks(1, 2, 3)
    assert list(parts) == ["hidden", "group", "query", "intermediate", "layer"]
    assert torch.equal(whole.head, parts["group"].head * parts["query"].head)
    assert torch.equal(whole.layer, parts["layer"].layer) and parts["layer"].head is None
    assert parts["hidden"].norm_gain is not None and parts["query"].norm_gain is None
