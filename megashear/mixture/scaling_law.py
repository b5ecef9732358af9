"""Fit a scaling law per domain, L(N) = A * N^-alpha + E, to losses of models of several sizes.

For each alpha the best A and E follow by linear least squares; alpha is found by a grid and a golden-section search
(variable projection, Golub and Pereyra 1973). Reports the residual and unphysical fits: E < 0 (a negative loss at
infinite size), or alpha at the end of its range.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megashear.errors import DataError

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 5.0
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class ScalingLaw:
    """L(N) = amplitude * N^-exponent + limit, in nats per token; `residual` is the root mean square error."""

    amplitude: float
    exponent: float
    limit: float
    residual: float

    def loss(self, parameters: float) -> float:
        """Loss of a model with the given number of parameters, embeddings included."""
        nats: float = self.amplitude * parameters**-self.exponent + self.limit
        return nats

    def problems(self) -> list[str]:
        """Reasons not to trust the fit; empty if there are none."""
        found = []
        if self.limit < 0:
            found.append(f"E = {self.limit:.2f} is negative, no loss can be")
        if self.amplitude <= 0:
            found.append("the loss does not fall with size")
        if not 1.01 * SMALLEST_ALPHA < self.exponent < 0.99 * LARGEST_ALPHA:
            found.append(f"alpha = {self.exponent:.4g} is at the end of its range, the law does not hold")
        return found


def solve(log_N: np.ndarray, loss_N: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """Amplitude (of exp(-alpha * log_N)), limit and sum of squared errors for one alpha."""
    base_N = np.exp(-alpha * log_N)
    centred_N = base_N - base_N.mean()
    amplitude = float(centred_N @ (loss_N - loss_N.mean()) / (centred_N @ centred_N))
    limit = float(loss_N.mean() - amplitude * base_N.mean())
    error_N = amplitude * base_N + limit - loss_N
    return amplitude, limit, float(error_N @ error_N)


def fit_scaling_law(parameters: np.ndarray, losses: np.ndarray) -> ScalingLaw:
    """Fit to sizes [N >= 3] and losses [N], float64. Raises DataError for too few, equal or impossible sizes."""
    size_N, loss_N = np.asarray(parameters, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(np.unique(size_N)) < 3 or not np.isfinite(loss_N).all() or not (np.isfinite(size_N) & (size_N > 0)).all():
        raise DataError(
            f"a scaling law needs finite losses at three sizes or more, got sizes {size_N.tolist()} and losses "
            f"{loss_N.tolist()}"
        )
    # Sizes are taken relative to their geometric mean, so that powers neither overflow nor vanish.
    centre = float(np.log(size_N).mean())
    log_N = np.log(size_N) - centre
    grid = np.geomspace(SMALLEST_ALPHA, LARGEST_ALPHA, 400)
    best = int(np.argmin([solve(log_N, loss_N, alpha)[2] for alpha in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    for _ in range(100):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        if solve(log_N, loss_N, left)[2] <= solve(log_N, loss_N, right)[2]:
            high = right
        else:
            low = left
    alpha = 0.5 * (low + high)
    amplitude, limit, squares = solve(log_N, loss_N, alpha)
    return ScalingLaw(amplitude * math.exp(alpha * centre), float(alpha), limit, math.sqrt(squares / len(loss_N)))


def fit_falling_law(steps: np.ndarray, losses: np.ndarray, largest_exponent: float) -> ScalingLaw:
    """Fit L(n) = A n^-alpha + E to losses [N] of one model at steps [N > 0], with A >= 0, E >= 0 and bounded alpha.

    A curve that does not fall gives A = 0. Exponents are a fixed grid, which gives the same bits on every machine.
    """
    step_N, loss_N = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    centre = float(np.log(step_N).mean())
    log_N = np.log(step_N) - centre
    best = ScalingLaw(0.0, SMALLEST_ALPHA, float(loss_N.mean()), float(loss_N.std()))
    for alpha in np.linspace(0.02, largest_exponent, 40) if log_N.any() else ():
        amplitude, limit, squares = solve(log_N, loss_N, alpha)
        if limit < 0:
            base_N = np.exp(-alpha * log_N)
            amplitude, limit = float(base_N @ loss_N / (base_N @ base_N)), 0.0
            squares = float(((amplitude * base_N - loss_N) ** 2).sum())
        residual = math.sqrt(squares / len(loss_N))
        if amplitude > 0 and residual < best.residual:
            best = ScalingLaw(amplitude * math.exp(alpha * centre), float(alpha), limit, residual)
    return best


def fit_domains(losses: Mapping[int, Mapping[str, float]]) -> dict[str, ScalingLaw]:
    """Fit one law per domain to {parameters: {domain: loss}}. Raises DataError if sizes have different domains."""
    names = list(next(iter(losses.values()), {}))
    for size, row in losses.items():
        if set(row) != set(names):
            raise DataError(
                f"the losses at {size} parameters name {sorted(row)}, others name {sorted(names)}; name all"
            )
    sizes = np.array(list(losses), dtype=np.float64)
    return {name: fit_scaling_law(sizes, np.array([row[name] for row in losses.values()])) for name in names}
