"""Expected sparsities, scheduled targets and the Lagrangian against the published values, in float64 and fp32."""

import pytest
import torch

from megashear.masks.constraint import expected_sparsity, lagrangian
from megashear.masks.sparsity_schedule import scheduled_target

FULL = {"hidden": 1 - 40 / 64, "group": 1 - 5 / 8, "intermediate": 1 - 56 / 96, "layer": 1 - 3 / 4}
STEP, WARMUP = 5, 8


def rows_of(log_alpha):
    return {name: value.reshape(-1, value.shape[-1]) for name, value in log_alpha.items()}


def scheduled(step):
    return {name: scheduled_target(full, step, WARMUP) for name, full in FULL.items()}


def test_expected_sparsity_of_every_row_matches(published):
    theirs = published.masks("B/expected_sparsity")
    for name, log_alpha_RN in rows_of(published.masks("B/log_alpha_clamped")).items():
        torch.testing.assert_close(expected_sparsity(log_alpha_RN), theirs[name].reshape(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("group", "step"), [("B", STEP), ("D2", WARMUP)])
def test_value_and_sparsities_match(published, dtype, tolerance, group, step):
    log_alpha = published.masks("B/log_alpha_clamped" if group == "B" else "D2/log_alpha")
    rows = {name: value.to(dtype) for name, value in rows_of(log_alpha).items()}
    pairs = {name: value.to(dtype) for name, value in published.masks("B/lambda").items()}
    loss, expected = lagrangian(rows, pairs, scheduled(step))
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(published[f"{group}/lag_loss"].item(), abs=tolerance)
    for name in FULL:
        assert expected[name].item() == pytest.approx(published.masks(f"{group}/expected")[name].item(), abs=tolerance)
        assert scheduled(step)[name] == pytest.approx(published.masks(f"{group}/target")[name].item(), abs=1e-12)


def test_gradients_match_where_the_loss_has_none(published):
    """A sample of exactly 0 or 1 passes no gradient of the cross-entropy, so the published one is the Lagrangian's."""
    log_alpha = {name: value.requires_grad_() for name, value in published.masks("B/log_alpha_clamped").items()}
    pairs = {name: value.requires_grad_() for name, value in published.masks("B/lambda").items()}
    loss, _ = lagrangian(rows_of(log_alpha), pairs, scheduled(STEP))
    loss.backward()
    samples, theirs = published.masks("B/zs"), published.masks("B/log_alpha_grad")
    compared = 0
    for name, value in log_alpha.items():
        closed = (samples[name] == 0) | (samples[name] == 1)
        compared += int(closed.sum())
        torch.testing.assert_close(value.grad[closed], theirs[name][closed], rtol=0, atol=1e-9)
        torch.testing.assert_close(pairs[name].grad, published.masks("B/lambda_grad")[name], rtol=0, atol=1e-9)
    assert compared > 200


def test_targets_grow_linearly_and_stay():
    assert [scheduled_target(0.5, step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.125, 0.5, 0.5]
    assert scheduled_target(0.5, 0, 0) == 0.5
