"""Adaptive data optimization: weights by how fast each domain's loss still falls (Jiang et al. 2024, arXiv 2410.11820).

A power law L(n) = A n^-alpha + E through each domain's losses so far, n being the steps, gives its learning speed
-dL/dn = alpha (L(n) - E) / n. Preferences are prior x credit x speed, the credit of a domain the root of its recent
share; what is played is a tenth of them and nine tenths of their mean so far (the paper's constants; its steps are our
updates, so that 1/t means the same share of a run). Key properties: no reference losses; a law that does not fall, as
while masks close, gives no speed, and where no domain learns the prior is played; at most `POINTS` losses a domain are
kept, by dropping every other one. Read next: `scaling_law.py` (the fit), `rules.py`.

Legend: K domain, T evaluation. Losses are nats per token.
"""

from typing import Any

import numpy as np

from megashear.config.schema import MixtureConfig
from megashear.data.guards import guarded
from megashear.data.scaling_law import fit_falling_law

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
    """The rule `ado` over one stage. Its prior is the weights at its first update."""

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
        """Keep a point of each `every` updates; when there are too many, every other one, and half as often then."""
        if step > 0 and self.updates % self.every == 0:
            self.points.append((step, [float(loss) if np.isfinite(loss) else None for loss in loss_K]))
        if len(self.points) > POINTS:
            self.points, self.every = self.points[::2], 2 * self.every

    def _preference(self, step: int) -> np.ndarray:
        """rho [K], sum 1: prior x credit x learning speed, none below the least; the prior where no domain learns."""
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
        """-dL/dn of a domain at `step`, 0 where its law does not fall or too few losses are known."""
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
