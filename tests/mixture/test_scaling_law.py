import numpy as np
import pytest

from megashear.errors import DataError
from megashear.mixture.reference_losses import LLAMA2_LOSSES, REFERENCE_LOSSES, REFERENCE_PARAMETERS
from megashear.mixture.scaling_law import ScalingLaw, fit_domains, fit_scaling_law

SIZES = np.array([7e9, 13e9, 70e9])


@pytest.mark.parametrize("target", REFERENCE_LOSSES)
def test_the_published_references_are_reproduced(target):
    """Both published rows, to the four digits that are printed."""
    for name, law in fit_domains(LLAMA2_LOSSES).items():
        assert abs(law.loss(REFERENCE_PARAMETERS[target]) - REFERENCE_LOSSES[target][name]) < 5e-5, name
        assert law.residual < 1e-12


def test_the_published_fit_of_commoncrawl_is_flagged():
    laws = fit_domains(LLAMA2_LOSSES)
    assert laws["commoncrawl"].limit == pytest.approx(-2.80, abs=0.005)
    assert [name for name, law in laws.items() if law.problems()] == ["commoncrawl"]


@pytest.mark.parametrize("alpha", [0.03, 0.15, 0.5, 1.5])
def test_a_law_is_found_again(alpha):
    truth = ScalingLaw(2.0 * 7e9**alpha, alpha, 1.2, 0.0)
    found = fit_scaling_law(SIZES, truth.loss(SIZES))
    assert found.loss(1e9) == pytest.approx(truth.loss(1e9), rel=1e-4)
    assert found.problems() == []


def test_noise_at_more_sizes_shows_in_the_residual():
    sizes = np.geomspace(1e8, 1e11, 12)
    noise = np.random.default_rng(0).normal(0, 0.01, 12)
    found = fit_scaling_law(sizes, 30 * sizes**-0.15 + 1.5 + noise)
    assert 0.005 < found.residual < 0.011
    assert found.loss(1e9) == pytest.approx(30 * 1e9**-0.15 + 1.5, abs=0.02)


def test_losses_that_rise_or_do_not_curve_are_flagged():
    assert "does not fall" in " ".join(fit_scaling_law(SIZES, np.array([1.0, 1.1, 1.2])).problems())
    straight = 3 - 0.1 * np.log(SIZES / 7e9) - 0.1 * np.log(SIZES / 7e9) ** 2
    assert "end of its range" in " ".join(fit_scaling_law(SIZES, straight).problems())


@pytest.mark.parametrize(
    "sizes, losses",
    [
        ([1e9, 2e9], [2, 1]),
        ([1e9, 1e9, 2e9], [2, 2, 1]),
        ([1e9, 2e9, 3e9], [2, float("nan"), 1]),
        ([0, 1, 2], [3, 2, 1]),
    ],
)
def test_what_cannot_be_fitted(sizes, losses):
    with pytest.raises(DataError, match="three sizes"):
        fit_scaling_law(np.array(sizes, float), np.array(losses, float))


def test_sizes_with_other_domains():
    with pytest.raises(DataError, match="name all"):
        fit_domains({1: {"a": 1.0}, 2: {"a": 1.0, "b": 2.0}, 3: {"a": 1.0}})
