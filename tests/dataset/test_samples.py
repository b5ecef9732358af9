import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.dataset.samples import Permutation, read_sample, sample_count, samples_at


@given(st.integers(1, 3000), st.integers(0, 2**63), st.text(max_size=5), st.integers(0, 100))
def test_every_key_gives_a_bijection(count, seed, domain, epoch):
    order = Permutation(count, seed, domain, epoch)(np.arange(count))
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(Permutation(count, seed, domain, epoch).inverse(order), np.arange(count))


def test_part_by_part_equals_all_at_once():
    whole = Permutation(100_003, 1, "web", 0)
    order = whole(np.arange(100_003))
    assert np.array_equal(whole(np.array([7, 99_999, 5])), order[[7, 99_999, 5]])


def test_other_keys_give_other_orders():
    base = Permutation(1000, 1, "web", 0)(np.arange(1000))
    for key in [(2, "web", 0), (1, "wec", 0), (1, "web", 1)]:
        same = (Permutation(1000, *key)(np.arange(1000)) == base).sum()
        assert same < 12  # a random order agrees in 1 place on average


def test_the_order_is_the_same_on_every_machine():
    assert Permutation(10, 1, "web", 0)(np.arange(10)).tolist() == [6, 5, 4, 7, 9, 8, 2, 1, 0, 3]


def test_orders_are_even():
    """Chi-squared over (position block, value block) of an order, and over where single numbers go under many keys."""
    order = Permutation(100_000, 3, "web", 0)(np.arange(100_000))
    table = np.histogram2d(np.arange(100_000), order, bins=20)[0]
    assert ((table - 250) ** 2 / 250).sum() < 361 + 6 * np.sqrt(2 * 361)
    places = np.array([Permutation(10, key)(np.arange(10)) for key in range(4000)])
    counts = np.stack([np.bincount(places[:, p], minlength=10) for p in range(10)])
    assert ((counts - 400) ** 2 / 400).sum() < 81 + 6 * np.sqrt(2 * 81)


@pytest.mark.parametrize("tokens, samples", [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_sample_count(tokens, samples):
    assert sample_count(tokens, 16) == samples


def test_samples_cover_every_token_as_a_target_once():
    stream = np.arange(16 * 9 + 5)
    targets = [read_sample(stream, k, 16)[1:] for k in range(sample_count(len(stream), 16))]
    assert all(len(t) == 16 for t in targets)
    assert np.array_equal(np.concatenate(targets), np.arange(1, 145))


def test_epochs_follow_each_other_whole():
    taken = samples_at(np.arange(25), 10, 5, "web")
    assert sorted(taken[:10]) == sorted(taken[10:20]) == list(range(10))
    assert taken[:10].tolist() != taken[10:20].tolist()
    assert samples_at(np.arange(8, 13), 10, 5, "web").tolist() == taken[8:13].tolist()
