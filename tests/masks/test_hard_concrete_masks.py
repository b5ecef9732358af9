"""Hard concrete functions against the published values, and properties of deterministic masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear import ops
from megashear.masks import hard_concrete_masks as hard_concrete
from megashear.masks.hard_concrete_masks import clamp, deterministic, expected_zeros, keep_largest, probability_zero

rows = st.integers(1, 4).flatmap(
    lambda r: st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=r, max_size=r)
    )
)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_constants_are_the_published_ones(published):
    gamma, zeta, eps, beta, slope, low, high = published["A/constants"].tolist()
    assert (gamma, zeta, eps) == (hard_concrete.GAMMA, hard_concrete.ZETA, hard_concrete.EPS)
    assert pytest.approx(beta, abs=1e-15) == hard_concrete.BETA
    assert pytest.approx(slope / beta, abs=1e-15) == hard_concrete.SOFT_SLOPE
    assert pytest.approx(-1.5985968, abs=1e-7) == hard_concrete.KAPPA
    assert (-low, high) == pytest.approx((4.605170185988092,) * 2, abs=1e-12)


def test_functions_of_log_alpha_match_the_published_grid(published):
    grid = published["A/loga_grid"]
    close(probability_zero(grid), published["A/cdf_qz"])
    clamped = clamp(grid.clone(), 4.605170185988092)
    close(clamped, published["A/loga_clamped"])
    close(probability_zero(clamped), published["A/cdf_qz_clamped"])
    close(deterministic(clamped[None], 0)[0], published["A/soft_mask"])
    close(ops.hard_concrete(clamped, published["A/eps_grid"]), published["A/z_hard"])


@pytest.mark.parametrize("mode", [1, 0])
def test_deterministic_masks_match_the_published_ones(published, source, target, mode):
    theirs = published.masks(f"C/eval_target_{mode}/zs")
    zeros = {"hidden": 24, "group": 3, "intermediate": 40, "layer": 1}
    for name, log_alpha in published.masks("B/log_alpha_clamped").items():
        rows_RN = log_alpha.reshape(-1, log_alpha.shape[-1])
        ours = deterministic(rows_RN, zeros[name] if mode == 1 else expected_zeros(rows_RN))
        close(ours.view_as(log_alpha), theirs[name])


@given(rows, st.data())
@settings(max_examples=60, deadline=None)
def test_each_row_has_its_zeros_and_keeps_the_lower_of_equal_units(values, data):
    log_alpha_RN = torch.tensor(values, dtype=torch.float32)
    units = log_alpha_RN.shape[1]
    zeros = data.draw(st.integers(0, units))
    mask_RN = deterministic(log_alpha_RN, zeros)
    assert ((mask_RN == 0).sum(dim=1) == zeros).all()
    for row, mask in zip(values, mask_RN, strict=True):
        order = sorted(range(units), key=lambda unit, row=row: (-row[unit], unit))
        assert mask.nonzero()[:, 0].tolist() == sorted(order[: units - zeros])


def test_rows_may_differ_in_how_many_they_keep():
    log_alpha_RN = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    kept = keep_largest(log_alpha_RN, torch.tensor([1, 2]))
    assert kept.tolist() == [[False, False, True], [True, True, False]]


def test_a_kept_unit_is_never_zero_even_where_the_sigmoid_underflows():
    assert (deterministic(torch.full((1, 4), -400.0), 1) != 0).sum() == 3
