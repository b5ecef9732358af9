"""Rules that update the domain weights, one class each, and the limits applied after them.

- `paper`, `reference`: exponential ascent on the excess of losses over their references (Sheared LLaMA, Algorithm 1).
- `ado`: weights follow how fast each domain's loss falls (adaptive data optimization, Jiang et al. 2024, arXiv
  2410.11820). A power law L(n) = A n^-alpha + E through a domain's losses gives its learning speed
  -dL/dn = alpha (L(n) - E) / n. Preferences are prior x credit x speed, the credit being the root of the recent share;
  weights are one tenth preferences and nine tenths of their mean so far (the paper's constants, per update).
- `schedule`, `static`: independent of losses.

Limits: weights are scaled by one factor and clipped to floor, cap and largest change, so that they sum to 1 and
unclipped domains keep their proportions. A rule's state is a few JSON numbers.

To add a rule: write a class with `update`, `state_dict` and `load_state_dict`, construct it in `make_rule`, and add its
name to the key `mixture.rule`. Shape suffixes: K domain, T evaluation, P points of a schedule.
"""

from typing import Any, Protocol

import numpy as np

from megashear.config.schema import ASCENDING, MixtureConfig
from megashear.errors import ConfigError
from megashear.mixture.blend import weight_array
from megashear.mixture.scaling_law import fit_falling_law


def guarded(weight_K: np.ndarray, before_K: np.ndarray, floor: float, cap: float, max_change: float) -> np.ndarray:
    """Apply floor, cap and largest change to weights.

    Args:
        weight_K: Weights that the rule proposes, float64 [K], sum 1.
        before_K: Weights before the update, float64 [K].
        floor, cap, max_change: Limits; floor * K <= 1 <= cap * K.

    Returns:
        float64 [K], sum 1, within [floor, cap] and `max_change` of `before_K`. If both cannot hold, floor and cap win.
    """
    if floor <= 0.0 and cap >= 1.0 and max_change >= 1.0:
        return weight_K
    low_K = np.clip(before_K - max_change, floor, cap)
    high_K = np.clip(before_K + max_change, floor, cap)
    if low_K.sum() > 1.0 or high_K.sum() < 1.0:
        low_K, high_K = np.full_like(weight_K, floor), np.full_like(weight_K, cap)
    return scaled_into(np.maximum(weight_K, np.finfo(np.float64).tiny), low_K, high_K)


def scaled_into(weight_K: np.ndarray, low_K: np.ndarray, high_K: np.ndarray) -> np.ndarray:
    """clip(f * weight_K, low_K, high_K) with the factor f for which it sums to 1, by bisection on log f.

    weight_K is positive; the sums of low_K and high_K enclose 1.
    """
    low, high = -1500.0, 1500.0
    log_K = np.log(weight_K)

    def clipped(shift: float) -> np.ndarray:
        clipped_K: np.ndarray = np.clip(np.exp(np.minimum(log_K + shift, 1.0)), low_K, high_K)
        return clipped_K

    for _ in range(200):
        middle = 0.5 * (low + high)
        if clipped(middle).sum() < 1.0:
            low = middle
        else:
            high = middle
    result_K = clipped(high)
    # What rounding leaves, at most some 1e-16, goes to the domain with the most room.
    missing = 1.0 - result_K.sum()
    room_K = high_K - result_K if missing > 0 else result_K - low_K
    result_K[int(np.argmax(room_K))] += missing
    return result_K


PLAYED, REMEMBERED = 0.1, 0.9
"""Share of the newest preferences in what is played (gamma_1), of the past in the credit's average (1 - gamma_2)."""
CREDIT_POWER = 0.5
LEAST_PREFERENCE = 0.01
LARGEST_EXPONENT = 0.8
"""Of a law: the paper's fit is held below it too."""
FIRST_FIT = 4
"""Evaluations before laws are fitted; until then the prior is played."""
POINTS = 32


class LearningSpeed:
    """Rule `ado` over one phase. Its prior is the weights at its first update."""

    def __init__(self, config: MixtureConfig, count: int) -> None:
        """count: of domains; config: its floor, cap and largest change hold."""
        self.config, self.count = config, count
        self.updates, self.every = 0, 1
        self.prior_K: np.ndarray | None = None
        self.mean_K = self.credit_K = np.zeros(count)
        self.points: list[tuple[int, list[float | None]]] = []

    def update(self, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, step: int) -> np.ndarray:
        """Weights [K] after the losses [K] at `step`; references do not count."""
        if self.prior_K is None:
            self.prior_K = self.mean_K = self.credit_K = np.asarray(weight_K, dtype=np.float64).copy()
        self._remember(loss_K, step)
        self.updates += 1
        self.credit_K = REMEMBERED * self.credit_K + (1.0 - REMEMBERED) * weight_K
        if step <= 0 or len(self.points) < FIRST_FIT:
            return np.asarray(weight_K, dtype=np.float64).copy()
        preference_K = self._preference(step)
        played_K = PLAYED * preference_K + (1.0 - PLAYED) * self.mean_K
        self.mean_K = self.mean_K + (preference_K - self.mean_K) / (self.updates + 1)
        config = self.config
        return guarded(played_K / played_K.sum(), weight_K, config.floor, config.cap, config.max_change)

    def _remember(self, loss_K: np.ndarray, step: int) -> None:
        """Keep one point per `every` updates; if there are too many, drop every other one and halve the frequency."""
        if step > 0 and self.updates % self.every == 0:
            self.points.append((step, [float(loss) if np.isfinite(loss) else None for loss in loss_K]))
        if len(self.points) > POINTS:
            self.points, self.every = self.points[::2], 2 * self.every

    def _preference(self, step: int) -> np.ndarray:
        """rho [K], sum 1: prior x credit x learning speed, with a minimum; the prior if no domain learns."""
        assert self.prior_K is not None
        speed_K = np.array([self._speed(index, step) for index in range(self.count)])
        wanted_K = self.prior_K * self.credit_K**CREDIT_POWER * speed_K
        total = wanted_K.sum()
        if not np.isfinite(total) or total <= 0:
            return self.prior_K.copy()
        raised_K = np.maximum(wanted_K / total, min(LEAST_PREFERENCE, 1.0 / self.count))
        rho_K: np.ndarray = raised_K / raised_K.sum()
        return rho_K

    def _speed(self, index: int, step: int) -> float:
        """-dL/dn of a domain at `step`; 0 if its law does not fall or has too few losses."""
        known = [(at, losses[index]) for at, losses in self.points if losses[index] is not None]
        if len(known) < FIRST_FIT:
            return 0.0
        steps, losses = (np.array(column) for column in zip(*known, strict=True))
        law = fit_falling_law(steps, losses, LARGEST_EXPONENT)
        return law.exponent * (law.loss(step) - law.limit) / step

    def state_dict(self) -> dict[str, Any]:
        """Prior, averages and the losses that laws are fitted to."""
        return {
            "updates": self.updates,
            "every": self.every,
            "prior": None if self.prior_K is None else self.prior_K.tolist(),
            "mean": self.mean_K.tolist(),
            "credit": self.credit_K.tolist(),
            "points": [[step, losses] for step, losses in self.points],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.updates, self.every = int(state["updates"]), int(state["every"])
        self.prior_K = None if state["prior"] is None else np.array(state["prior"], dtype=np.float64)
        self.mean_K, self.credit_K = (np.array(state[name], dtype=np.float64) for name in ("mean", "credit"))
        self.points = [(int(step), list(losses)) for step, losses in state["points"]]


# A weight that an update would take below this, or to zero by underflow, stays here, so that a domain can come back.
SMALLEST = 1e-12


class Rule(Protocol):
    """Update rule of a mixture over one phase."""

    def update(self, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, step: int) -> np.ndarray:
        """Weights [K], sum 1, after an evaluation at `step`; a loss is NaN where it was never known."""

    def state_dict(self) -> dict[str, Any]:
        """What the next updates depend on, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


class Stateless:
    """Rule without state."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class Static(Stateless):
    """Constant weights."""

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
    """Weights given for the phase's start, its end and equidistant points between, interpolated linearly."""

    def __init__(self, points_PK: np.ndarray, steps: int) -> None:
        """points_PK: [P, K], each row sums to 1; steps: of the phase."""
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
    """Build the rule of a config for a phase. Raises ConfigError for a schedule of other domains."""
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
    """Update domain weights by exponential ascent (Sheared LLaMA, Algorithm 1).

    paper: w' ~ w exp(eta max(l - r, 0)); reference: w' ~ (1-c) softmax(ln w + eta (l - r)) + c/n.

    Args:
        weight_K: Domain weights, float64 [K], sum 1.
        loss_K, reference_K: Held-out and reference losses, float64 [K]; a non-finite excess counts as 0.
        config: Mixture section: rule, step size, mixing and limits.

    Returns:
        Updated weights, float64 [K], sum 1, within the limits; a weight of 0 stays 0 under `paper`.
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
