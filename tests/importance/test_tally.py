"""Scores, errors and scores by domain from sums, against numpy on the values themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megashear.importance.calibrate import ScoreSums


@given(
    seed=st.integers(0, 2**32 - 1),
    batches=st.integers(2, 6),
    sequences=st.integers(1, 5),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
    root=st.booleans(),
)
def test_sums_are_those_of_all_values(seed: int, batches: int, sequences: int, scale: float, root: bool) -> None:
    generator = np.random.default_rng(seed)
    value = scale * generator.exponential(size=(batches, sequences, 2, 3))
    domain = generator.integers(0, 3, size=(batches, sequences))
    tally = ScoreSums(3, root)
    for one, own in zip(value, domain, strict=True):
        tally.add(torch.from_numpy(own), torch.from_numpy(one))
    batch = value.sum(1)
    count = batches * sequences
    if root:
        wanted = np.sqrt(value.sum((0, 1)))
        error = batch.std(0, ddof=1) * np.sqrt(batches) / (2 * wanted)
    else:
        wanted = value.mean((0, 1))
        error = batch.std(0, ddof=1) * np.sqrt(batches) / count
    found = tally.score()
    np.testing.assert_allclose(found[0], wanted, rtol=1e-12)
    np.testing.assert_allclose(found[1], error, rtol=1e-9)
    for number in set(domain.flat):
        of_domain = value[domain == number]
        total = np.sqrt(of_domain.sum(0)) if root else of_domain.mean(0)
        np.testing.assert_allclose(tally.domain_score(number), total, rtol=1e-12)
    assert tally.count_K.tolist() == [int((domain == number).sum()) for number in range(3)]


def test_a_unit_that_nothing_flows_through_has_no_error() -> None:
    tally = ScoreSums(1, root=True)
    for _ in range(2):
        tally.add(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3))
    assert [value.tolist() for value in tally.score()] == [[0.0] * 3] * 2


def test_the_error_is_the_spread_of_the_score_between_drawings() -> None:
    """500 calibrations of 16 batches: the errors they name are the standard deviation of the scores they give."""
    generator = torch.Generator().manual_seed(0)
    for root in (False, True):
        pairs = []
        for _ in range(500):
            tally = ScoreSums(1, root)
            for _ in range(16):
                tally.add(torch.zeros(4, dtype=torch.int64), torch.rand(4, 1, generator=generator).square())
            pairs.append([float(value) for value in tally.score()])
        scores, errors = np.array(pairs).T
        assert errors.mean() == pytest.approx(scores.std(ddof=1), rel=0.1)
