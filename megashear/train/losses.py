"""Held-out losses as values: of sequences, of domains, of all; as JSON; of two models over the same sequences.

Sequences differ from one another far more than two models do on one sequence, so the difference of losses taken pair by
pair has a much smaller error than the losses have: `heldout.json` of a stage keeps what its last evaluation found for
each sequence, with a digest of each domain's text, by which other text is recognised.
Key property: no torch, so that reports read it. Read next: `evaluate.py`, `plot/compare.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megashear.errors import DataError
from megashear.files.atomic import write_json

Losses = dict[str, tuple[float, float]]
"""Loss in nats per token and its standard error by domain; the error of a single sequence is not known: NaN."""
SequenceLosses = dict[str, np.ndarray]
"""Loss of each held-out sequence by domain, fp64 [sequences], in the order of `HeldOut.rows`."""
SEQUENCES_NAME = "heldout.json"


def summarise(losses: SequenceLosses) -> Losses:
    """Each domain's mean and its standard error."""
    return {name: mean_and_error(loss_N) for name, loss_N in losses.items()}


def mean_and_error(loss_N: np.ndarray) -> tuple[float, float]:
    """Mean of [N] values and its standard error, by their standard deviation; NaN where there is only one."""
    error = float(loss_N.std(ddof=1) / math.sqrt(len(loss_N))) if len(loss_N) > 1 else math.nan
    return float(loss_N.mean()), error


def mean_loss(losses: Losses) -> float:
    """Mean over domains, in nats per token."""
    return sum(loss for loss, _ in losses.values()) / len(losses)


def mean_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of values with standard errors, and the error of it, the values being of independent domains."""
    values, errors = np.array(pairs, dtype=np.float64).T
    return float(values.mean()), float(np.sqrt(np.square(errors).sum()) / len(pairs))


def to_json(losses: Losses) -> dict[str, list[float | None]]:
    """Losses and errors as JSON values that round-trip: [loss, error] by domain, null for what is not finite."""
    return {name: _values(pair) for name, pair in losses.items()}


def from_json(values: Mapping[str, Sequence[float | None]]) -> Losses:
    """What `to_json` gave."""
    return {name: (_number(loss), _number(error)) for name, (loss, error) in values.items()}


@dataclass(frozen=True)
class DomainSequences:
    """A domain's held-out sequences: the digest of their text, and the loss [N] of each in nats per token, fp64."""

    text: str
    loss_N: np.ndarray


def save_sequences(folder: Path, losses: SequenceLosses, digests: Mapping[str, str]) -> None:
    """Write a stage's `heldout.json` whole, or leave the one that is there; digests: by domain, of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: {"text": digests[name], "losses": _values(loss_N.tolist())} for name, loss_N in losses.items()}
    write_json(folder / SEQUENCES_NAME, content)


def read_sequences(folder: Path) -> dict[str, DomainSequences]:
    """By domain what `save_sequences` wrote; nothing where there is no file. Raises DataError for another content."""
    path = folder / SEQUENCES_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: DomainSequences(str(one["text"]), np.array([_number(value) for value in one["losses"]]))
            for name, one in content.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); remove it to compare without pairs") from None


def paired_difference(first: DomainSequences | None, second: DomainSequences | None) -> tuple[float, float] | None:
    """Mean of second less first over the same sequences, and its standard error; None where they are not the same."""
    if first is None or second is None or other_text(first, second):
        return None
    return mean_and_error(second.loss_N - first.loss_N)


def other_text(first: DomainSequences | None, second: DomainSequences | None) -> bool:
    """Whether two evaluations are known to have read other sequences."""
    if first is None or second is None:
        return False
    return first.text != second.text or len(first.loss_N) != len(second.loss_N)


def _values(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
