import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.mixture.blend import apportion
from megashear.mixture.reference_losses import CONTINUED_WEIGHTS, PRUNING_WEIGHTS


def largest_backlog(history: list[np.ndarray], seats: int) -> float:
    """Walk a weight history; compare the seats with the weights' cumulative share, summed apart from the remainders."""
    share_K = np.zeros(len(history[0]))
    seat_K = np.zeros(len(history[0]), dtype=np.int64)
    remainder_K = np.zeros(len(history[0]))
    largest = 0.0
    for weight_K in history:
        got_K, remainder_K = apportion(weight_K, remainder_K, seats)
        assert got_K.sum() == seats and got_K.min() >= 0
        share_K, seat_K = share_K + weight_K * seats, seat_K + got_K
        largest = max(largest, float(np.abs(seat_K - share_K).max()))
    return largest


@pytest.mark.parametrize("seats", [1, 32, 256])
@pytest.mark.parametrize("weights", [PRUNING_WEIGHTS, CONTINUED_WEIGHTS], ids=["pruning", "continued"])
def test_published_weights_stay_within_one_sequence(weights, seats):
    weight_K = np.array(list(weights.values()))
    assert largest_backlog([weight_K / weight_K.sum()] * 2000, seats) < 1


@settings(max_examples=60)
@given(domains=st.integers(2, 12), seats=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_weight_histories_stay_within_one_sequence(domains, seats, seed):
    """Weights that walk: an update every 20 batches, as held-out evaluations make them."""
    random = np.random.default_rng(seed)
    weight_K = random.dirichlet(np.full(domains, 0.5))
    history = []
    for _ in range(20):
        weight_K = weight_K * np.exp(random.normal(0, 0.2, domains))
        weight_K = 0.999 * weight_K / weight_K.sum() + 0.001 / domains
        history += [weight_K] * 20
    assert largest_backlog(history, seats) < 1


def test_shares_that_are_whole_are_given_as_they_are():
    seat_K, remainder_K = apportion(np.array([0.5, 0.25, 0.25]), np.zeros(3), 8)
    assert seat_K.tolist() == [4, 2, 2] and remainder_K.tolist() == [0, 0, 0]


def test_a_domain_of_weight_zero_gets_nothing():
    remainder_K = np.zeros(3)
    for _ in range(100):
        seat_K, remainder_K = apportion(np.array([0.3, 0.7, 0.0]), remainder_K, 7)
        assert seat_K[2] == 0


def test_one_domain_gets_everything():
    seat_K, remainder_K = apportion(np.array([1.0]), np.zeros(1), 5)
    assert seat_K.tolist() == [5] and remainder_K.tolist() == [0.0]


def test_seats_given_in_advance_are_paid_back():
    seat_K, remainder_K = apportion(np.array([0.1, 0.9]), np.array([-0.9, 0.9]), 4)
    assert seat_K.tolist() == [0, 4] and np.allclose(remainder_K, [-0.5, 0.5])


def test_more_whole_seats_owed_than_there_are():
    """Three domains owed nearly a seat each, one seat to give: nobody gets a negative number."""
    remainder_K = np.array([0.95, 0.95, 0.95, -0.95, -0.95, -0.95])
    seat_K, after_K = apportion(np.full(6, 1 / 6), remainder_K, 1)
    assert seat_K.sum() == 1 and seat_K.min() == 0
    assert np.isclose(after_K.sum(), 0)
