"""Held-out losses sequence by sequence: `heldout.json` of a stage, and two models over the same sequences.

Sequences differ from one another far more than two models do on one sequence, so the difference of losses taken pair by
pair has a much smaller error than the losses have. The file keeps what the stage's last evaluation found for each
sequence, with a digest of each domain's text, by which other text is recognised.
Key property: no torch, so that reports read it. Read next: `evaluate.py`, `plot/compare.py`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megashear.errors import DataError
from megashear.files.atomic import write_json
from megashear.train.losses import Losses, finite_values, number

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


@dataclass(frozen=True)
class DomainSequences:
    """A domain's held-out sequences: the digest of their text, and the loss [N] of each in nats per token, fp64."""

    text: str
    loss_N: np.ndarray


def save_sequences(folder: Path, losses: SequenceLosses, digests: Mapping[str, str]) -> None:
    """Write a stage's `heldout.json` whole, or leave the one that is there; digests: by domain, of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: finite_values(loss_N.tolist()) for name, loss_N in losses.items()}
    write_json(folder / SEQUENCES_NAME, {n: {"text": digests[n], "losses": value} for n, value in values.items()})


def read_sequences(folder: Path) -> dict[str, DomainSequences]:
    """By domain what `save_sequences` wrote; nothing where there is no file. Raises DataError for another content."""
    path = folder / SEQUENCES_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: DomainSequences(str(one["text"]), np.array([number(value) for value in one["losses"]]))
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
