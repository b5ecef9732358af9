"""Losses as JSON; the losses themselves are compared with transformers' in `test_evaluate_model.py`."""

import json
import math

import numpy as np
import pytest

from megashear.config.training_schema import PretrainConfig, PruneConfig
from megashear.evaluation.losses import from_json, mean_and_error, to_json


def test_losses_round_trip_through_json() -> None:
    losses = {"web": (2.5000000000000004, 0.1), "книги": (3.25, math.nan), "code": (math.nan, math.nan)}
    text = json.dumps(to_json(losses), allow_nan=False)
    found = from_json(json.loads(text))
    assert repr(found) == repr(losses)


def test_the_error_is_that_of_the_mean() -> None:
    draws = np.random.default_rng(0).normal(3.0, 0.5, (20_000, 16))
    means, errors = zip(*(mean_and_error(row) for row in draws), strict=True)
    assert math.isclose(np.sqrt(np.mean(np.square(errors))), np.std(means), rel_tol=0.02)
    assert math.isnan(mean_and_error(np.array([1.0]))[1])


@pytest.mark.parametrize("section", [PruneConfig(), PretrainConfig()])
def test_evaluation_costs_a_twentieth_by_default(section: PruneConfig | PretrainConfig) -> None:
    """A forward pass is a third of a training pass; the published data has 7 domains."""
    batch = section.batch
    assert 7 * batch.eval_sequences / 3 <= 0.05 * batch.eval_interval * batch.global_batch
