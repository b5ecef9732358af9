import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megashear.mixture.update_rules import guarded


def test_rails_that_are_off_change_nothing():
    weight_K = np.array([0.2, 0.3, 0.5])
    assert guarded(weight_K, weight_K[::-1], 0.0, 1.0, 1.0) is weight_K


def test_floor_and_cap_keep_the_proportions_of_the_others():
    weight_K = guarded(np.array([0.6, 0.3, 0.0999, 0.0001]), np.full(4, 0.25), 0.05, 1.0, 1.0)
    assert np.isclose(weight_K[3], 0.05) and np.isclose(weight_K[0] / weight_K[1], 2.0)
    weight_K = guarded(np.array([0.8, 0.15, 0.05]), np.full(3, 1 / 3), 0.0, 0.6, 1.0)
    assert np.isclose(weight_K[0], 0.6) and np.isclose(weight_K[1] / weight_K[2], 3.0)


def test_largest_change():
    before_K = np.array([0.25, 0.25, 0.5])
    weight_K = guarded(np.array([0.7, 0.1, 0.2]), before_K, 0.0, 1.0, 0.1)
    assert np.allclose(weight_K, [0.35, 0.15, 0.5]) or np.abs(weight_K - before_K).max() <= 0.1 + 1e-12


def test_floor_wins_over_the_change_where_both_cannot_hold():
    weight_K = guarded(np.array([0.98, 0.01, 0.01]), np.array([1.0, 0.0, 0.0]), 0.2, 1.0, 0.01)
    assert np.allclose(weight_K, [0.6, 0.2, 0.2])


@given(st.integers(2, 8), st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1), st.integers(0, 2**32))
def test_all_rails_hold_at_once(domains, floor_share, cap_share, max_change, seed):
    floor, cap = floor_share / domains, 1 / domains + cap_share * (1 - 1 / domains)
    random = np.random.default_rng(seed)
    before_K = guarded(random.dirichlet(np.full(domains, 0.3)), np.full(domains, 1 / domains), floor, cap, 1.0)
    weight_K = guarded(random.dirichlet(np.full(domains, 0.3)), before_K, floor, cap, max_change)
    assert abs(weight_K.sum() - 1) < 1e-12
    assert weight_K.min() >= floor - 1e-12 and weight_K.max() <= cap + 1e-12
    assert np.abs(weight_K - before_K).max() <= max_change + 1e-12
