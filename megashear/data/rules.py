"""How domain weights are chosen at an update: one class a rule, behind one interface.

`paper` and `reference` raise the weights of domains whose loss exceeds its reference (exponential ascent); `static` and
`schedule` follow no loss; `ado` follows how fast each domain's loss still falls, and needs no references. Key
properties: weights in, weights out, in float64; what a rule remembers is a few numbers of JSON. Read next: `ado.py`,
`mixture.py` (who calls), `guards.py`.

Legend: K domain, P points of a schedule. Losses are nats per token.
"""

from typing import Any, Protocol

import numpy as np

from megashear.config.mixture import ASCENDING
from megashear.config.schema import MixtureConfig
from megashear.data.ado import LearningSpeed
from megashear.data.blend import weight_array
from megashear.data.guards import guarded
from megashear.errors import ConfigError

# A weight that an update would take below this, or to zero by underflow, stays here, so that a domain can come back.
SMALLEST = 1e-12


class Rule(Protocol):
    """A rule of the mixture over one stage."""

    def update(self, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, step: int) -> np.ndarray:
        """Weights [K], sum 1, after an evaluation at `step`; a loss is NaN where it was never known."""

    def state_dict(self) -> dict[str, Any]:
        """What the next updates depend on, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


class Stateless:
    """A rule that remembers nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class Static(Stateless):
    """Weights as they are."""

    def update(self, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, step: int) -> np.ndarray:
        """The same weights."""
        return weight_K.copy()


class Ascent(Stateless):
    """Exponential ascent on the excess losses (Sheared LLaMA, algorithm 1; DoReMi, Xie et al. 2023)."""

    def __init__(self, config: MixtureConfig) -> None:
        """config: its `rule` is `paper` or `reference`."""
        self.config = config

    def update(self, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, step: int) -> np.ndarray:
        """See `update_weights`."""
        return update_weights(self.config.rule, weight_K, loss_K, reference_K, self.config)


class Schedule(Stateless):
    """Weights typed in for the stage's start, its end and points at equal distances between, interpolated linearly."""

    def __init__(self, points_PK: np.ndarray, steps: int) -> None:
        """points_PK: [P, K], each row sums to 1; steps: of the stage."""
        self.points_PK, self.steps = points_PK, steps

    def update(self, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, step: int) -> np.ndarray:
        """The weights due at `step`."""
        last = len(self.points_PK) - 1
        place = min(step / self.steps, 1.0) * last
        before = min(int(place), max(last - 1, 0))
        after, share = min(before + 1, last), place - before
        due_K: np.ndarray = (1.0 - share) * self.points_PK[before] + share * self.points_PK[after]
        return due_K


def make_rule(config: MixtureConfig, names: list[str], steps: int) -> Rule:
    """The rule of a config for these domains and a stage of so many steps; raises ConfigError for a schedule of other
    domains.
    """
    if config.rule in ASCENDING:
        return Ascent(config)
    if config.rule == "ado":
        return LearningSpeed(config, len(names))
    return Static() if config.rule == "static" else Schedule(schedule_points(config, names), steps)


def schedule_points(config: MixtureConfig, names: list[str]) -> np.ndarray:
    """`mixture.schedule` as float64 [P, K] in the order of `names`, rows normalised; raises ConfigError."""
    schedule = config.schedule or {}
    if set(schedule) != set(names):
        raise ConfigError(f"mixture.schedule names {sorted(schedule)}, the dataset has {sorted(names)}; name each once")
    columns = [schedule[name] for name in names]
    return np.stack([weight_array(row, names) for row in zip(*columns, strict=True)])


def update_weights(
    rule: str, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, config: MixtureConfig
) -> np.ndarray:
    """Domain weights after one update of exponential ascent.

    paper: w' ~ w exp(eta max(l - r, 0)); reference: w' ~ (1-c) softmax(ln w + eta (l - r)) + c/n.
    weight_K, loss_K, reference_K: float64 [K], weights sum to 1. An excess that is not finite counts as 0: no evidence.
    Returns float64 [K], finite, sum 1, within `floor`, `cap` and `max_change`; a weight of 0 stays 0 under `paper`.
    """
    assert rule in ASCENDING, rule
    weight_K = np.asarray(weight_K, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        excess_K = np.asarray(loss_K, dtype=np.float64) - np.asarray(reference_K, dtype=np.float64)
    excess_K = np.where(np.isfinite(excess_K), excess_K, 0.0)
    if rule == "paper":
        excess_K = np.maximum(excess_K, 0.0)
    with np.errstate(divide="ignore"):
        log_K = np.log(weight_K) + np.clip(config.eta * excess_K, -1e300, 1e300)
    raised_K = np.exp(log_K - log_K.max())
    raised_K /= raised_K.sum()
    if rule == "reference":
        raised_K = (1.0 - config.mixing) * raised_K + config.mixing / len(raised_K)
    raised_K = np.where(weight_K > 0, np.maximum(raised_K, SMALLEST), raised_K)
    return guarded(raised_K / raised_K.sum(), weight_K, config.floor, config.cap, config.max_change)
