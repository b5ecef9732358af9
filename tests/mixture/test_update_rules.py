"""Rules of the mixture that follow no reference: a schedule, and the learning speed of fitted power laws."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.schema import MixtureConfig
from megashear.errors import ConfigError
from megashear.mixture.domain_weights import Mixture
from megashear.mixture.scaling_law import fit_falling_law
from megashear.mixture.update_rules import LEAST_PREFERENCE, PLAYED, POINTS

TOKENS = {"web": 700, "book": 200, "code": 100}
ADO = MixtureConfig(rule="ado")
SCHEDULE = MixtureConfig(rule="schedule", schedule={"code": [1, 1, 6], "web": [3, 1, 2], "book": [0, 2, 0]})


def losses_at(step: int) -> dict[str, float]:
    """Laws of known learning speeds: web 0.3, book 0.02, code none."""
    return {"web": 2.0 + 3.0 * step**-0.3, "book": 3.0 + 1.0 * step**-0.02, "code": 1.5}


def walk(mixture: Mixture, steps: range) -> None:
    for step in steps:
        mixture.update(losses_at(max(step, 1)), step)


def test_a_schedule_is_interpolated_over_the_phase():
    mixture = Mixture(SCHEDULE, TOKENS, {}, steps=100)
    assert mixture.weights == {"web": 0.75, "book": 0.0, "code": 0.25}
    due = ((0, [0.75, 0, 0.25]), (25, [0.5, 0.25, 0.25]), (50, [0.25, 0.5, 0.25]), (100, [0.25, 0, 0.75]))
    for step, expected in due:
        mixture.update({}, step)
        assert np.allclose(mixture.weight_K, expected, atol=1e-15)
    mixture.update({}, 140)
    assert np.allclose(mixture.weight_K, [0.25, 0, 0.75])


def test_a_schedule_of_one_point_stays_and_is_not_overruled():
    mixture = Mixture(dataclasses.replace(SCHEDULE, schedule={"code": [2], "web": [1], "book": [1]}), TOKENS, {}, 10)
    mixture.set_weights({"web": 0.1, "book": 0.8, "code": 0.1})
    mixture.update({}, 5)
    assert mixture.weights == {"web": 0.25, "book": 0.25, "code": 0.5}


def test_a_schedule_of_other_domains():
    with pytest.raises(ConfigError, match=r"mixture\.schedule names \['web'\]"):
        Mixture(MixtureConfig(rule="schedule", schedule={"web": [1.0]}), TOKENS, {}, 10)


def test_learning_speed_follows_the_law_that_falls():
    mixture = Mixture(ADO, TOKENS, {}, steps=2000)
    start = mixture.weight_K.copy()
    walk(mixture, range(0, 150, 50))
    assert np.array_equal(mixture.weight_K, start)  # too few losses for a fit
    walk(mixture, range(150, 2001, 50))
    assert mixture.weights["web"] > 0.85 and mixture.weights["code"] < 0.03
    assert mixture.weights["code"] > 0.9 * PLAYED * LEAST_PREFERENCE


def test_the_first_weights_are_the_papers_formula():
    """Prior x root of the credit x alpha (L - E) / n, floored; a tenth of it and nine tenths of the mean so far."""
    mixture = Mixture(ADO, TOKENS, {}, steps=2000)
    walk(mixture, range(50, 201, 50))
    prior_K = np.array([0.7, 0.2, 0.1])
    speed_K = np.array([0.3 * 3.0 * 200**-0.3, 0.02 * 200**-0.02, 0.0]) / 200
    wanted_K = prior_K * np.sqrt(prior_K) * speed_K
    wanted_K = np.maximum(wanted_K / wanted_K.sum(), 0.01)
    expected_K = 0.1 * wanted_K / wanted_K.sum() + 0.9 * prior_K
    assert np.allclose(mixture.weight_K, expected_K, atol=2e-3)  # the grid of exponents is 0.02 apart


def test_where_nothing_falls_the_prior_is_played():
    mixture = Mixture(ADO, TOKENS, {}, steps=500)
    for step in range(0, 500, 20):
        mixture.update({"web": 2.0 + step / 100, "book": 2.5, "code": None}, step)
    assert np.allclose(mixture.weight_K, [0.7, 0.2, 0.1], atol=1e-12)


def test_what_is_remembered_is_bounded_and_resumes_to_the_bit():
    whole, first = (Mixture(ADO, TOKENS, {}, steps=9000) for _ in range(2))
    walk(whole, range(0, 9000, 50))
    walk(first, range(0, 4000, 50))
    again = Mixture(ADO, TOKENS, {}, steps=9000)
    again.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    walk(again, range(4000, 9000, 50))
    assert again.state_dict() == whole.state_dict()
    assert POINTS / 2 <= len(whole.state_dict()["rule"]["points"]) <= POINTS


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.one_of(st.floats(), st.floats(0.1, 9)), min_size=3, max_size=3), min_size=5, max_size=12))
def test_weights_stay_a_distribution_whatever_the_losses(sequence):
    mixture = Mixture(dataclasses.replace(ADO, floor=0.02, cap=0.9), TOKENS, {}, steps=100)
    for step, losses in enumerate(sequence, start=1):
        mixture.update(dict(zip(TOKENS, losses, strict=True)), step)
        assert np.isfinite(mixture.weight_K).all() and abs(mixture.weight_K.sum() - 1) < 1e-12
        assert mixture.weight_K.min() > 0


def test_a_falling_law_is_found_again():
    steps = np.arange(1, 60) * 25
    law = fit_falling_law(steps, 2.0 + 3.0 * steps**-0.3, 0.8)
    assert (law.exponent, law.limit, law.amplitude) == (pytest.approx(0.3), pytest.approx(2.0), pytest.approx(3.0))
    rising = fit_falling_law(steps, 2.0 + 0.001 * steps, 0.8)
    assert rising.amplitude == 0 and rising.loss(100) == rising.limit
    assert fit_falling_law(steps, 3.0 * steps**-0.05 - 1.0, 0.8).limit >= 0
    assert fit_falling_law(np.full(5, 10), np.arange(5.0), 0.8).amplitude == 0
