"""Held-out losses by domain as plain values: their mean and its error, and as JSON.

Key property: no numpy and no torch, so that a plan's tables are printed at once. Read next: `sequences.py`.
"""

import math
from collections.abc import Mapping, Sequence

Losses = dict[str, tuple[float, float]]
"""Loss in nats per token and its standard error by domain; the error of a single sequence is not known: NaN."""


def mean_loss(losses: Losses) -> float:
    """Mean over domains, in nats per token."""
    return sum(loss for loss, _ in losses.values()) / len(losses)


def mean_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of values with standard errors, and the error of it, the values being of independent domains."""
    mean = sum(value for value, _ in pairs) / len(pairs)
    return mean, math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs)


def to_json(losses: Losses) -> dict[str, list[float | None]]:
    """Losses and errors as JSON values that round-trip: [loss, error] by domain, null for what is not finite."""
    return {name: finite_values(pair) for name, pair in losses.items()}


def from_json(values: Mapping[str, Sequence[float | None]]) -> Losses:
    """What `to_json` gave."""
    return {name: (number(loss), number(error)) for name, (loss, error) in values.items()}


def finite_values(values: Sequence[float]) -> list[float | None]:
    """Values for JSON: null for what is not finite."""
    return [value if math.isfinite(value) else None for value in values]


def number(value: float | None) -> float:
    """A value from JSON: NaN for null."""
    return math.nan if value is None else float(value)
