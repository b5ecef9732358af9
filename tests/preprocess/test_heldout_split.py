import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.preprocess.heldout_split import HeldOutRule, TokensByHash, heldout_hashes


def random_documents(count: int, seed: int = 0, length: int = 100):
    random = np.random.default_rng(seed)
    return random.integers(0, 2**64, count, dtype=np.uint64), random.integers(1, 2 * length, count)


def held_tokens(hash_N, length_N, rule) -> int:
    return int(length_N[np.isin(hash_N, heldout_hashes(hash_N, length_N, rule))].sum())


def test_the_fraction_where_it_is_enough():
    hash_N, length_N = random_documents(100_000)
    held = heldout_hashes(hash_N, length_N, HeldOutRule(0.01, 10, 100))
    assert 800 < len(held) < 1200
    assert held.max() < 0.01 * 2**64


def test_more_where_the_fraction_is_not_enough():
    hash_N, length_N = random_documents(2000)
    for sequences in (50, 100, 300):
        tokens = held_tokens(hash_N, length_N, HeldOutRule(0.005, sequences, 99))
        assert sequences * 100 <= tokens < sequences * 100 + 200


def test_never_more_than_the_limit():
    hash_N, length_N = random_documents(2000)
    rule = HeldOutRule(0.005, 10**6, 99, limit=0.1)
    assert 0.1 * length_N.sum() - 200 < held_tokens(hash_N, length_N, rule) <= 0.1 * length_N.sum()


def test_none_where_none_is_wanted():
    hash_N, length_N = random_documents(2000)
    assert len(heldout_hashes(hash_N, length_N, HeldOutRule(0.0, 500, 99))) == 0
    assert len(heldout_hashes(hash_N[:0], length_N[:0], HeldOutRule())) == 0


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 10**6)), min_size=1, max_size=30),
    st.floats(0, 0.999),
    st.integers(0, 1000),
    st.floats(0, 1),
    st.randoms(),
)
def test_independent_of_order_and_some_text_stays(documents, fraction, sequences, limit, random):
    rule = HeldOutRule(fraction, sequences, 64, limit)
    hash_N = np.array([number for number, _ in documents], dtype=np.uint64)
    length_N = np.array([length for _, length in documents])
    held = heldout_hashes(hash_N, length_N, rule)
    shuffled = list(range(len(documents)))
    random.shuffle(shuffled)
    assert np.array_equal(held, heldout_hashes(hash_N[shuffled], length_N[shuffled], rule))
    assert len(held) < len(np.unique(hash_N))


@settings(max_examples=200)
@given(
    st.integers(0, 3000),
    st.integers(0, 5),
    st.sampled_from([-0.1, 0.0, 0.0003, 0.01, 0.5, 0.999, 1.0, 2.0]),
    st.integers(0, 3000),
    st.sampled_from([0.0, 0.001, 0.2, 1.0]),
)
def test_the_documents_up_to_the_bound_say_the_same_as_all(count, seed, fraction, sequences, limit):
    """What a merge looks at (hashes up to a bound, and the domain's tokens) decides as all documents do."""
    rule = HeldOutRule(fraction, sequences, 64, limit)
    hash_N, length_N = random_documents(count, seed)
    hash_N[: count // 4] = hash_N[count // 4 : count // 4 + count // 4]  # texts that stand twice
    counted = TokensByHash()
    for some in np.array_split(np.arange(count), 3):
        counted.add(hash_N[some], length_N[some])
    low_N = hash_N <= np.uint64(counted.bound(rule))
    found = heldout_hashes(hash_N[low_N], length_N[low_N], rule, int(length_N.sum()))
    assert np.array_equal(found, heldout_hashes(hash_N, length_N, rule))


def test_few_documents_are_looked_at():
    """The bound is no further than the threshold needs: half a percent of a domain that has enough."""
    hash_N, length_N = random_documents(200_000)
    counted = TokensByHash()
    counted.add(hash_N, length_N)
    assert (hash_N <= np.uint64(counted.bound(HeldOutRule(0.005, 10, 100)))).mean() < 0.0055
