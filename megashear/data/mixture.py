"""Dynamic batch loading: domain weights that follow the excess of each domain's loss over its reference.

Exponential ascent in two forms, the paper's (Sheared LLaMA, algorithm 1) and the published code's (DoReMi's update),
and `static`; guard rails for both. Key properties: weights stay finite, positive and sum to 1 whatever the losses; a
domain whose evaluation failed keeps its last loss and is named. Read next: `references.py` (reference losses),
`guards.py` (floor, cap, largest change).

Legend: K domain. Losses are nats per token.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megashear.config.schema import MixtureConfig
from megashear.data.blend import weight_array
from megashear.data.guards import guarded
from megashear.errors import CheckpointError, ConfigError

# A weight that an update would take below this, or to zero by underflow, stays here, so that a domain can come back.
SMALLEST = 1e-12


def update_weights(
    rule: str, weight_K: np.ndarray, loss_K: np.ndarray, reference_K: np.ndarray, config: MixtureConfig
) -> np.ndarray:
    """Domain weights after one update.

    paper: w' ~ w exp(eta max(l - r, 0)); reference: w' ~ (1-c) softmax(ln w + eta (l - r)) + c/n; static: w' = w.
    weight_K, loss_K, reference_K: float64 [K], weights sum to 1. An excess that is not finite counts as 0: no evidence.
    Returns float64 [K], finite, sum 1, within `floor`, `cap` and `max_change`; a weight of 0 stays 0 under `paper`.
    """
    weight_K = np.asarray(weight_K, dtype=np.float64)
    if rule == "static":
        return weight_K.copy()
    assert rule in ("paper", "reference"), rule
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


def initial_weights(config: MixtureConfig, tokens: Mapping[str, int]) -> np.ndarray:
    """Weights at the start, float64 [K], in the order of `tokens` (training tokens by domain).

    Raises ConfigError where `mixture.initial_weights` names other domains than the dataset.
    """
    if config.initial_weights is None:
        return weight_array(dict(tokens), list(tokens))
    try:
        return weight_array(config.initial_weights, list(tokens))
    except ConfigError as error:
        raise ConfigError(f"mixture.initial_weights: {error}") from error


class Mixture:
    """The weights of a run and what they came from.

    Attributes: `names` of the domains in order; `weight_K` float64 [K]; `reference_K` float64 [K]; `loss_K` float64
    [K], the last (smoothed) losses, NaN where a domain was never evaluated; `history`, a list of {"step", "weights",
    "losses"} by update.
    """

    def __init__(self, config: MixtureConfig, tokens: Mapping[str, int], references: Mapping[str, float]) -> None:
        """tokens: training tokens by domain, in order; references: reference loss by domain (unused under `static`).

        Raises ConfigError: weights or references of other domains, a floor or cap that cannot hold for so many domains.
        """
        self.config, self.names = config, list(tokens)
        count = len(self.names)
        if config.floor * count > 1 or config.cap * count < 1:
            raise ConfigError(
                f"mixture.floor {config.floor:g} and mixture.cap {config.cap:g} cannot hold for {count} domains: "
                f"the floor is at most {1 / count:.4g}, the cap at least that"
            )
        self.weight_K = initial_weights(config, tokens)
        self.reference_K = np.zeros(count)
        if config.rule != "static":
            if set(references) != set(self.names):
                raise ConfigError(f"reference losses name {sorted(references)}, the dataset has {sorted(self.names)}")
            self.reference_K = np.array([references[name] for name in self.names], dtype=np.float64)
        self.loss_K = np.full(count, np.nan)
        self.history: list[dict[str, Any]] = []

    @property
    def weights(self) -> dict[str, float]:
        """Weights by domain."""
        return dict(zip(self.names, self.weight_K.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Start a stage from these weights; raises ConfigError where they name other domains."""
        self.weight_K = weight_array(weights, self.names)

    @property
    def references(self) -> dict[str, float] | None:
        """Reference losses by domain; None under `static`, which has none."""
        return None if self.config.rule == "static" else dict(zip(self.names, self.reference_K.tolist(), strict=True))

    def update(self, losses: Mapping[str, float | None], step: int) -> list[str]:
        """Take an evaluation's losses by domain, smooth them and update the weights; returns warnings for the log.

        A domain that is missing, None or not finite keeps its last loss (its excess counts as 0 where it has none).
        """
        warnings = []
        for index, name in enumerate(self.names):
            loss, last = losses.get(name), self.loss_K[index]
            if loss is None or not np.isfinite(loss):
                kept = "keeps its weight's share" if np.isnan(last) else f"keeps its last loss {last:.4f}"
                warnings.append(f"step {step}: the held-out loss of domain {name!r} is {loss}; it {kept}")
            elif np.isnan(last):
                self.loss_K[index] = loss
            else:
                self.loss_K[index] = self.config.smoothing * last + (1.0 - self.config.smoothing) * float(loss)
        self.weight_K = update_weights(self.config.rule, self.weight_K, self.loss_K, self.reference_K, self.config)
        told = [None if np.isnan(loss) else float(loss) for loss in self.loss_K]
        self.history.append({"step": step, "weights": self.weight_K.tolist(), "losses": told})
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """Weights, last losses, references and history as JSON values (doubles round-trip)."""
        return {
            "names": self.names,
            "weights": self.weight_K.tolist(),
            "losses": [None if np.isnan(loss) else float(loss) for loss in self.loss_K],
            "references": self.reference_K.tolist(),
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, references included; raises CheckpointError where it is of other domains."""
        if state.get("names") != self.names:
            raise CheckpointError(
                f"the checkpoint's mixture has domains {state.get('names')}, this run has {self.names}; resume with "
                "the dataset that it was saved with, or start a new run folder"
            )
        self.weight_K = np.array(state["weights"], dtype=np.float64)
        self.loss_K = np.array([np.nan if loss is None else loss for loss in state["losses"]], dtype=np.float64)
        self.reference_K = np.array(state["references"], dtype=np.float64)
        self.history = [dict(entry) for entry in state["history"]]
