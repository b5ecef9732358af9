import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.schema import MixtureConfig
from megashear.errors import CheckpointError, ConfigError
from megashear.mixture.domain_weights import Mixture, initial_weights
from megashear.mixture.reference_losses import PRUNING_WEIGHTS, REFERENCE_LOSSES
from megashear.mixture.update_rules import update_weights

PAPER, REFERENCE = MixtureConfig(), MixtureConfig(rule="reference")
TOKENS = {"web": 700, "book": 200, "code": 100}
TARGETS = {"web": 2.0, "book": 2.2, "code": 0.8}


def published():
    return np.load(Path(__file__).parent / "fixtures" / "published_mixture.npz", allow_pickle=False)


def test_the_published_codes_twelve_updates():
    """Arrays computed by the published implementation, float32 inside: equal to its rounding."""
    arrays = published()
    assert np.array_equal(arrays["p0"], list(PRUNING_WEIGHTS.values()))
    assert np.array_equal(arrays["target"], list(REFERENCE_LOSSES["1.3b"].values()))
    weight_K = arrays["p0"]
    for loss_K, expected_K in zip(arrays["losses"], arrays["doremi"], strict=True):
        weight_K = update_weights("reference", weight_K, loss_K, arrays["target"], REFERENCE)
        assert np.abs(weight_K - expected_K).max() < 1e-6


def test_the_papers_formula():
    weight_K, loss_K, reference_K = np.array([0.5, 0.3, 0.2]), np.array([2.5, 1.0, 1.0]), np.array([2.0, 2.0, 1.0])
    raised = np.array([0.5 * np.exp(0.5), 0.3, 0.2])
    assert np.allclose(update_weights("paper", weight_K, loss_K, reference_K, PAPER), raised / raised.sum(), rtol=1e-15)
    doubled = dataclasses.replace(PAPER, eta=2.0)
    raised[0] = 0.5 * np.exp(1.0)
    assert np.allclose(
        update_weights("paper", weight_K, loss_K, reference_K, doubled), raised / raised.sum(), rtol=1e-15
    )


def test_below_its_reference_a_domain_is_left_or_pushed_down():
    weight_K, loss_K, reference_K = np.full(2, 0.5), np.array([1.0, 2.0]), np.array([2.0, 2.0])
    assert np.array_equal(update_weights("paper", weight_K, loss_K, reference_K, PAPER), weight_K)
    assert update_weights("reference", weight_K, loss_K, reference_K, REFERENCE)[0] < 0.3


def test_static_changes_nothing():
    mixture = Mixture(MixtureConfig(rule="static"), TOKENS, {})
    mixture.update({"web": 9.0, "book": 1.0, "code": 1.0}, 50)
    assert mixture.weights == {"web": 0.7, "book": 0.2, "code": 0.1}


def test_a_weight_of_zero_stays_under_paper():
    weight_K = update_weights("paper", np.array([0.0, 0.6, 0.4]), np.array([5.0, 2.0, 2.0]), np.ones(3), PAPER)
    assert weight_K[0] == 0.0


LOSSES = st.one_of(st.floats(), st.sampled_from([0.0, 1e4, -1e4, 1e308, float("inf"), float("-inf"), float("nan")]))


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(["paper", "reference"]),
    st.lists(st.lists(LOSSES, min_size=4, max_size=4), min_size=1, max_size=8),
    st.sampled_from(
        [{}, {"floor": 0.05}, {"cap": 0.4}, {"max_change": 0.01}, {"floor": 0.01, "cap": 0.5, "max_change": 0.1}]
    ),
    st.floats(0, 0.99),
)
def test_weights_stay_a_distribution_whatever_the_losses(rule, sequence, rails, smoothing):
    config = dataclasses.replace(PAPER, rule=rule, smoothing=smoothing, **rails)
    tokens = dict.fromkeys("abcd", 1)
    mixture = Mixture(config, tokens, dict.fromkeys("abcd", 2.0))
    for step, losses in enumerate(sequence):
        warnings = mixture.update(dict(zip("abcd", losses, strict=True)), step)
        assert len(warnings) == sum(not np.isfinite(loss) for loss in losses)
        assert np.isfinite(mixture.weight_K).all() and (mixture.weight_K > 0).all()
        assert abs(mixture.weight_K.sum() - 1) < 1e-12


def test_a_failed_evaluation_keeps_the_last_loss_and_is_named():
    mixture = Mixture(PAPER, TOKENS, TARGETS)
    mixture.update({"web": 3.0, "book": 3.0, "code": 1.0}, 50)
    twin = Mixture(PAPER, TOKENS, TARGETS)
    twin.update({"web": 3.0, "book": 3.0, "code": 1.0}, 50)
    warnings = mixture.update({"web": float("nan"), "code": 1.1}, 100)
    twin.update({"web": 3.0, "book": 3.0, "code": 1.1}, 100)
    assert (
        len(warnings) == 2
        and "'web'" in warnings[0]
        and "last loss 3.0000" in warnings[0]
        and "step 100" in warnings[0]
    )
    assert np.array_equal(mixture.weight_K, twin.weight_K)


def test_smoothing_keeps_a_share_of_the_last_loss():
    mixture = Mixture(dataclasses.replace(PAPER, smoothing=0.75), TOKENS, TARGETS)
    mixture.update({"web": 4.0, "book": 2.0, "code": 1.0}, 1)
    mixture.update({"web": 2.0, "book": 2.0, "code": 1.0}, 2)
    assert mixture.loss_K.tolist() == [3.5, 2.0, 1.0]


def test_initial_weights():
    assert initial_weights(PAPER, TOKENS).tolist() == [0.7, 0.2, 0.1]
    given_weights = dataclasses.replace(PAPER, initial_weights={"code": 2, "web": 1, "book": 1})
    assert initial_weights(given_weights, TOKENS).tolist() == [0.25, 0.25, 0.5]
    with pytest.raises(ConfigError, match=r"mixture\.initial_weights"):
        initial_weights(dataclasses.replace(PAPER, initial_weights={"web": 1}), TOKENS)


@pytest.mark.parametrize("rails", [{"floor": 0.34}, {"cap": 0.33}])
def test_rails_that_cannot_hold(rails):
    with pytest.raises(ConfigError, match="cannot hold for 3 domains"):
        Mixture(dataclasses.replace(PAPER, **rails), TOKENS, TARGETS)


def test_references_of_other_domains():
    with pytest.raises(ConfigError, match="reference losses name"):
        Mixture(PAPER, TOKENS, {"web": 1.0})
    assert Mixture(MixtureConfig(rule="static"), TOKENS, {}).weights == {"web": 0.7, "book": 0.2, "code": 0.1}


def test_state_goes_through_json_to_the_bit():
    mixture = Mixture(PAPER, TOKENS, TARGETS)
    mixture.update({"web": 3.1, "book": None, "code": 1.3}, 50)
    again = Mixture(PAPER, TOKENS, dict.fromkeys(TOKENS, 1.0))
    again.load_state_dict(json.loads(json.dumps(mixture.state_dict(), allow_nan=False)))
    for each in (mixture, again):
        each.update({"web": 2.9, "book": 2.5, "code": 1.1}, 100)
    assert again.state_dict() == mixture.state_dict()
    with pytest.raises(CheckpointError, match="domains"):
        Mixture(PAPER, {"web": 1}, {"web": 1.0}).load_state_dict(mixture.state_dict())
