"""Blended stream: which sample of which domain is at each place of the global sample stream.

A domain's count in a global batch is its share plus the remainder carried from earlier batches, rounded; its samples
follow the epoch orders of `dataset/samples.py`; a keyed permutation shuffles the batch. The stream is a function of
(seed, weight history, batch sizes), so it is the same for every layout. Its state is a few numbers per domain.

Rounding is by largest remainder with the remainder carried forward. If fewer places are left than domains have
fractions, they go in the order of deadlines, as in Tijdeman's solution of the chairman assignment problem (Discrete
Mathematics 32, 1980). Taking the largest fraction first lets the backlog of small domains exceed one sequence (1.18 at
the published weights and batches of one).

Shape suffixes: B sequence of the global batch, K domain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megashear.dataset.dataset_folder import Dataset
from megashear.dataset.samples import Permutation, sample_count, samples_at
from megashear.errors import CheckpointError, ConfigError, DataError, TrainingError

# Deadlines are counted to this backlog rather than to 1: room for weights that rise before the next batch.
BACKLOG = 0.8


def apportion(weight_K: np.ndarray, remainder_K: np.ndarray, seats: int) -> tuple[np.ndarray, np.ndarray]:
    """Round shares to whole places, and carry the remainders.

    Args:
        weight_K: Shares, float64 [K], sum 1.
        remainder_K: Places owed from earlier batches, float64 [K], sum 0; negative if given in advance.
        seats: Number of places.

    Returns:
        Places of each domain, int64 [K], and the new remainders, float64 [K], within 1 of zero for constant weights.
    """
    due_K = weight_K * seats + remainder_K
    seat_K = np.maximum(np.floor(due_K), 0.0)
    fraction_K = due_K - seat_K
    missing = seats - int(seat_K.sum())
    if missing > 0:
        chosen = np.argsort(deadline_key(fraction_K, weight_K), kind="stable")[:missing]
        seat_K[chosen] += 1.0
    elif missing < 0:
        held = np.where(seat_K > 0, fraction_K, np.inf)
        seat_K[np.argsort(held, kind="stable")[:-missing]] -= 1.0
    return seat_K.astype(np.int64), due_K - seat_K


def deadline_key(fraction_K: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """Order in which domains get one more place, float64 [K], smallest first.

    Domains with a fraction of at least 1/(2K-2) come first, by the time in which their weight raises the fraction to
    the bound; those beyond it by the excess; the others follow, largest fraction first.
    """
    domains = len(fraction_K)
    least = 1.0 / (2 * domains - 2) if domains > 1 else 0.0
    bound = min(1.0 - least, BACKLOG)
    late_K = fraction_K > bound
    time_K = (bound - fraction_K) / np.maximum(weight_K, 1e-12)
    key_K = np.where(late_K, (bound - fraction_K) * 1e15, time_K)
    # 1e-9: a fraction such as 1/12 that rounding made a little smaller is still eligible.
    return np.where(fraction_K >= least - 1e-9, key_K, 1e20 - fraction_K * 1e19)


NORMALISED = 1e-14
"""Distance from 1 of a sum of weights that were normalised before: some roundings."""


@dataclass(frozen=True)
class DomainSource:
    """A domain of the stream: its name, the tokens of its training split, and the sequence length S."""

    name: str
    tokens: int
    sequence_length: int

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return sample_count(self.tokens, self.sequence_length)


@dataclass(frozen=True)
class BatchPlan:
    """Plan of one global batch: domain and sample of each sequence; `first` is the number of its first one."""

    first: int
    domain_B: np.ndarray
    sample_B: np.ndarray

    def __len__(self) -> int:
        return len(self.domain_B)

    def same(self, other: "BatchPlan") -> bool:
        """Whether both plans have the same samples in the same places."""
        equal = np.array_equal(self.domain_B, other.domain_B) and np.array_equal(self.sample_B, other.sample_B)
        return self.first == other.first and equal


def sources(dataset: Dataset, sequence_length: int) -> list[DomainSource]:
    """Training splits of a dataset. Raises DataError for a domain that is shorter than one sample."""
    found = [DomainSource(d, len(dataset.stream(d, "train")), sequence_length) for d in dataset.domains]
    for source in found:
        if source.samples == 0:
            raise DataError(
                f"{dataset.folder}: domain {source.name!r} has {source.tokens} training tokens, fewer than one sample "
                f"of {sequence_length + 1}; add text, leave the domain out or lower data.sequence_length"
            )
    return found


def weight_array(weights: Mapping[str, float] | Sequence[float] | np.ndarray, names: list[str]) -> np.ndarray:
    """Weights as float64 [K] that sum to 1, from a dict by name or an array in order. Raises ConfigError."""
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ConfigError(f"domain weights name {sorted(weights)}, the dataset has {sorted(names)}; name each once")
        weights = [weights[name] for name in names]
    weight_K = np.array(weights, dtype=np.float64)
    if weight_K.shape != (len(names),) or not np.isfinite(weight_K).all() or weight_K.min() < 0 or weight_K.sum() <= 0:
        raise ConfigError(
            f"domain weights {list(weights)}: give one finite, non-negative number per domain, not all zero"
        )
    total = weight_K.sum()
    # Normalised weights stay as they are: divided again, they would differ in their last bit from those they came from.
    return weight_K if abs(total - 1.0) <= NORMALISED else weight_K / total


class BlendedStream:
    """Global sample stream of a run.

    Attributes:
        names: Names of the domains.
        cursor_K: Samples taken of each domain.
    """

    def __init__(
        self,
        domains: list[DomainSource],
        seed: int,
        weights: Mapping[str, float] | Sequence[float] | np.ndarray,
        exhausted: str = "repeat",
        repeat_limit: int | None = None,
    ) -> None:
        """exhausted: `repeat`, `renormalise` or `stop` where a domain's epoch ends (config `data.exhausted`);
        repeat_limit: epochs after which a domain that repeats is shared among the others; None: never.
        """
        assert exhausted in ("repeat", "renormalise", "stop"), exhausted
        self.domains, self.seed, self.exhausted = domains, seed, exhausted
        self.names = [source.name for source in domains]
        self._samples_K = np.array([source.samples for source in domains], dtype=np.int64)
        epochs = repeat_limit if exhausted == "repeat" else 1
        self._capacity_K = None if epochs is None else epochs * self._samples_K
        self.cursor_K = np.zeros(len(domains), dtype=np.int64)
        self._remainder_K = np.zeros(len(domains), dtype=np.float64)
        self._next = 0
        self.set_weights(weights)

    @property
    def weights(self) -> np.ndarray:
        """Present domain weights, float64 [K], sum 1."""
        return self._weight_K.copy()

    def set_weights(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> None:
        """Set the weights from the next batch on; remainders are kept."""
        self._weight_K = weight_array(weights, self.names)

    def next_batch(self, global_batch: int) -> BatchPlan:
        """Plan the next global batch and advance.

        Returns:
            A plan with domain_B (index into `names`) and sample_B (sample of the domain), int64 [B].

        Raises:
            TrainingError: A domain ran out under `stop`, or all domains ran out; the state is not changed.
        """
        seat_K, remainder_K = self._seats(global_batch)
        domain_B = np.repeat(np.arange(len(self.domains)), seat_K)
        parts = [
            samples_at(np.arange(start, start + seats), int(count), self.seed, name)
            for name, start, seats, count in zip(self.names, self.cursor_K, seat_K, self._samples_K, strict=True)
        ]
        place_B = Permutation(global_batch, self.seed, "places in a batch", self._next)(np.arange(global_batch))
        plan = BatchPlan(self._next, domain_B[place_B], np.concatenate(parts)[place_B])
        self.cursor_K, self._remainder_K = self.cursor_K + seat_K, remainder_K
        self._next += global_batch
        return plan

    def _seats(self, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of each domain in the next batch, int64 [K], and the remainders to carry, float64 [K]."""
        if self._capacity_K is not None and self.exhausted != "stop":
            return self._seats_of_the_rest(global_batch, self._capacity_K)
        seat_K, remainder_K = apportion(self._weight_K, self._remainder_K, global_batch)
        if self.exhausted == "stop" and (over_K := self.cursor_K + seat_K > self._samples_K).any():
            name = self.names[int(np.argmax(over_K))]
            raise TrainingError(
                f"domain {name!r} has run out of data after {self._next} sequences and data.exhausted is `stop`; "
                "add data, lower its weight, or set data.exhausted to repeat or renormalise"
            )
        return seat_K, remainder_K

    def _seats_of_the_rest(self, global_batch: int, capacity_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places if exhausted domains give theirs to the others, in proportion to the weights of those."""
        left_K = capacity_K - self.cursor_K
        seat_K, remainder_K = np.zeros_like(left_K), self._remainder_K.copy()
        open_K = left_K > 0
        remainder_K[~open_K] = 0.0
        while True:
            weight_K = np.where(open_K, self._weight_K, 0.0)
            if weight_K.sum() <= 0:
                raise TrainingError(
                    f"every domain has run out of data after {self._next} sequences; add data, train for fewer steps, "
                    "or set data.exhausted to repeat, without data.repeat_limit"
                )
            weight_K /= weight_K.sum()
            remainder_K += weight_K * (0.0 - remainder_K[open_K].sum()) * open_K
            rest = global_batch - int(seat_K[~open_K].sum())
            seat_K[open_K], remainder_K[open_K] = apportion(weight_K[open_K], remainder_K[open_K], rest)
            over_K = open_K & (seat_K > left_K)
            if not over_K.any():
                return seat_K, remainder_K
            remainder_K[open_K] = self._remainder_K[open_K]
            seat_K[over_K], remainder_K[over_K] = left_K[over_K], 0.0
            open_K = open_K & ~over_K

    def run_out(self) -> list[str]:
        """Domains that ran out, whose weight the others share."""
        if self._capacity_K is None:
            return []
        return [name for name, gone in zip(self.names, self.cursor_K >= self._capacity_K, strict=True) if gone]

    def epochs(self) -> dict[str, float]:
        """Epochs taken of each domain's training split."""
        return {name: float(c / n) for name, c, n in zip(self.names, self.cursor_K, self._samples_K, strict=True)}

    def tokens(self) -> dict[str, int]:
        """Tokens predicted of each domain."""
        return {s.name: int(c) * s.sequence_length for s, c in zip(self.domains, self.cursor_K, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """State of the stream as JSON values, of constant size."""
        return {
            "seed": self.seed,
            "names": self.names,
            "samples": self._samples_K.tolist(),
            "next": self._next,
            "cursors": self.cursor_K.tolist(),
            "remainders": self._remainder_K.tolist(),
            "weights": self._weight_K.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state. Raises CheckpointError for other domains, other data or another seed."""
        own = self.state_dict()
        for key, meaning in (("names", "domains"), ("samples", "samples per domain"), ("seed", "seed")):
            if state.get(key) != own[key]:
                raise CheckpointError(
                    f"the checkpoint's data stream has other {meaning}: {state.get(key)}, this run has {own[key]}; "
                    "resume with the dataset, seed and sequence length that it was saved with, or start a new run "
                    "folder"
                )
        self._next = int(state["next"])
        self.cursor_K = np.array(state["cursors"], dtype=np.int64)
        self._remainder_K = np.array(state["remainders"], dtype=np.float64)
        self._weight_K = np.array(state["weights"], dtype=np.float64)
