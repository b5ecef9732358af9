"""Records as arrays: gaps, order, double steps, and the mix that was read."""

import numpy as np

from megashear.plots.metric_series import Phase, names_in, phases_of, realised_mix
from megashear.plots.training_plots import running_mean


def train(step: int, **domain_tokens: int) -> dict:
    return {"phase": "prune", "step": step, "kind": "train", "domain_tokens": domain_tokens}


def test_phases_and_steps_are_in_order_and_the_later_of_two_counts() -> None:
    records = [
        {"phase": "pretrain", "step": 5, "kind": "train", "loss": 1.0},
        {"phase": "prune", "step": 20, "kind": "train", "loss": 2.0},
        {"phase": "prune", "step": 10, "kind": "train", "loss": 3.0},
        {"phase": "prune", "step": 20, "kind": "train", "loss": None},
    ]
    prune, pretrain = phases_of(records)
    assert (prune.name, pretrain.name) == ("prune", "pretrain")
    assert prune.steps("train").tolist() == [10, 20] and prune.last_step() == 20
    np.testing.assert_array_equal(prune.values("train", "loss"), [3.0, np.nan])
    np.testing.assert_array_equal(prune.values("train", "absent", "deeper"), [np.nan, np.nan])
    assert prune.steps("eval").shape == (0,)


def test_names_are_the_union_in_order() -> None:
    phase = Phase(
        "prune", {"eval": [{"step": 1, "loss": {"b": 1}}, {"step": 2, "loss": {"b": 1, "a": 2}}, {"step": 3}]}
    )
    assert names_in([phase], "eval", "loss") == ["b", "a"]


def test_realised_mix_is_between_evaluations() -> None:
    trained = [train(10, a=100, b=0), train(20, a=200, b=0), train(30, a=250, b=50), train(40, a=300, b=100)]
    evaluated = [{"phase": "prune", "step": step, "kind": "eval"} for step in (0, 20, 40)]
    (phase,) = phases_of([*trained, *evaluated])
    middles, shares = realised_mix(phase, ["a", "b"])
    assert middles.tolist() == [10, 30]
    np.testing.assert_allclose(shares, [[1.0, 0.5], [0.0, 0.5]])


def test_realised_mix_without_records_is_empty() -> None:
    middles, shares = realised_mix(Phase("prune", {}), ["a", "b"])
    assert middles.shape == (0,) and shares.shape == (2, 0)


def test_running_mean_leaves_gaps_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.0, 2.0, 4.0, 4.0])
    np.testing.assert_allclose(running_mean(np.array([2.0]), 3), [2.0])
    assert np.isnan(running_mean(np.full(3, np.nan), 3)).all()
