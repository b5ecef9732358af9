"""Domain weights of a phase, updated from held-out losses by the configured rule (dynamic batch loading).

Weights are finite, positive and sum to 1 for any losses. A domain whose evaluation failed keeps its last loss and is
reported. Shape suffixes: K domain. Losses are nats per token.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megashear.config.schema import ASCENDING, MixtureConfig
from megashear.errors import CheckpointError, ConfigError
from megashear.mixture.blend import weight_array
from megashear.mixture.update_rules import Schedule, make_rule, schedule_points


def initial_weights(config: MixtureConfig, tokens: Mapping[str, int]) -> np.ndarray:
    """Weights at the start, float64 [K], in the order of `tokens` (training tokens by domain).

    Raises:
        ConfigError: `mixture.initial_weights` names other domains than the dataset.
    """
    if config.initial_weights is None:
        return weight_array(dict(tokens), list(tokens))
    try:
        return weight_array(config.initial_weights, list(tokens))
    except ConfigError as error:
        raise ConfigError(f"mixture.initial_weights: {error}") from error


def starting_weights(config: MixtureConfig, tokens: Mapping[str, int]) -> np.ndarray:
    """Weights before the first update, float64 [K]: a schedule's first, else `initial_weights`."""
    if config.rule == "schedule":
        first_K: np.ndarray = schedule_points(config, list(tokens))[0]
        return first_K
    return initial_weights(config, tokens)


class Mixture:
    """Domain weights of a phase, and their state.

    Attributes:
        names: Domains in order.
        weight_K, reference_K: Weights and reference losses, float64 [K].
        loss_K: Last (smoothed) losses, float64 [K]; NaN if a domain was never evaluated.
        rule: The update rule.
    """

    def __init__(
        self, config: MixtureConfig, tokens: Mapping[str, int], references: Mapping[str, float], steps: int = 1
    ) -> None:
        """tokens: training tokens by domain, in order; references: reference loss by domain, for the rules that follow
        one; steps: of the phase.

        Raises ConfigError: weights or references of other domains, a floor or cap that cannot hold for so many domains.
        """
        self.config, self.names = config, list(tokens)
        count = len(self.names)
        if config.floor * count > 1 or config.cap * count < 1:
            raise ConfigError(
                f"mixture.floor {config.floor:g} and mixture.cap {config.cap:g} cannot hold for {count} domains: "
                f"the floor is at most {1 / count:.4g}, the cap at least that"
            )
        self.rule = make_rule(config, self.names, steps)
        self.weight_K = starting_weights(config, tokens)
        self.reference_K = np.zeros(count)
        if config.rule in ASCENDING:
            if set(references) != set(self.names):
                raise ConfigError(f"reference losses name {sorted(references)}, the dataset has {sorted(self.names)}")
            self.reference_K = np.array([references[name] for name in self.names], dtype=np.float64)
        self.loss_K = np.full(count, np.nan)

    @property
    def weights(self) -> dict[str, float]:
        """Weights by domain."""
        return dict(zip(self.names, self.weight_K.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weights at the start of a phase, unless a schedule does. Raises ConfigError for other domains."""
        if not isinstance(self.rule, Schedule):
            self.weight_K = weight_array(weights, self.names)

    @property
    def references(self) -> dict[str, float] | None:
        """Reference losses by domain; None if the rule does not use any."""
        follows = self.config.rule in ASCENDING
        return dict(zip(self.names, self.reference_K.tolist(), strict=True)) if follows else None

    def update(self, losses: Mapping[str, float | None], step: int) -> list[str]:
        """Smooth the losses of an evaluation and update the weights; returns warnings for the log.

        A missing or non-finite loss keeps the domain's last one; without a last one its excess counts as 0.
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
        self.weight_K = self.rule.update(self.weight_K, self.loss_K, self.reference_K, step)
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """Weights, last losses, references and state of the rule, as JSON values (doubles round-trip)."""
        return {
            "names": self.names,
            "weights": self.weight_K.tolist(),
            "losses": [None if np.isnan(loss) else float(loss) for loss in self.loss_K],
            "references": self.reference_K.tolist(),
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state, references included. Raises CheckpointError for other domains."""
        if state.get("names") != self.names:
            raise CheckpointError(
                f"the checkpoint's mixture has domains {state.get('names')}, this run has {self.names}; resume with "
                "the dataset that it was saved with, or start a new run folder"
            )
        self.weight_K = np.array(state["weights"], dtype=np.float64)
        self.loss_K = np.array([np.nan if loss is None else loss for loss in state["losses"]], dtype=np.float64)
        self.reference_K = np.array(state["references"], dtype=np.float64)
        self.rule.load_state_dict(state.get("rule", {}))
