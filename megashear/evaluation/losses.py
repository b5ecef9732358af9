"""Held-out losses by domain: means and errors, JSON, tables, and losses of each sequence (`heldout.json`).

Sequences differ from one another far more than two models differ on one sequence, so a paired difference has a much
smaller error than the losses themselves. `heldout.json` keeps the loss of each sequence, with a digest of each domain's
text. Does not import torch.
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
from megashear.planning.text_table import table

Losses = dict[str, tuple[float, float]]
"""Loss in nats per token and its standard error by domain; the error of a single sequence is not known: NaN."""


def mean_loss(losses: Losses) -> float:
    """Mean over domains, in nats per token."""
    return sum(loss for loss, _ in losses.values()) / len(losses)


def mean_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of values with standard errors, and its error if the values are independent."""
    mean = sum(value for value, _ in pairs) / len(pairs)
    return mean, math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs)


def to_json(losses: Losses) -> dict[str, list[float | None]]:
    """Losses and errors as JSON values: [loss, error] by domain, null if not finite."""
    return {name: finite_values(pair) for name, pair in losses.items()}


def from_json(values: Mapping[str, Sequence[float | None]]) -> Losses:
    """Inverse of `to_json`."""
    return {name: (number(loss), number(error)) for name, (loss, error) in values.items()}


def finite_values(values: Sequence[float]) -> list[float | None]:
    """Values for JSON: null if not finite."""
    return [value if math.isfinite(value) else None for value in values]


def number(value: float | None) -> float:
    """Number from JSON: NaN for null."""
    return math.nan if value is None else float(value)


SequenceLosses = dict[str, np.ndarray]
"""Loss of each held-out sequence by domain, fp64 [sequences], in the order of `HeldOut.rows`."""
SEQUENCES_NAME = "heldout.json"


def summarise(losses: SequenceLosses) -> Losses:
    """Each domain's mean and its standard error."""
    return {name: mean_and_error(loss_N) for name, loss_N in losses.items()}


def mean_and_error(loss_N: np.ndarray) -> tuple[float, float]:
    """Mean of [N] values and its standard error; NaN for a single value."""
    error = float(loss_N.std(ddof=1) / math.sqrt(len(loss_N))) if len(loss_N) > 1 else math.nan
    return float(loss_N.mean()), error


@dataclass(frozen=True)
class DomainSequences:
    """Held-out sequences of a domain: digest of their text, and the loss [N] of each in nats per token, fp64."""

    text: str
    loss_N: np.ndarray


def save_sequences(folder: Path, losses: SequenceLosses, digests: Mapping[str, str]) -> None:
    """Write a phase's `heldout.json`; `digests` are those of the text, by domain."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: finite_values(loss_N.tolist()) for name, loss_N in losses.items()}
    write_json(folder / SEQUENCES_NAME, {n: {"text": digests[n], "losses": value} for n, value in values.items()})


def read_sequences(folder: Path) -> dict[str, DomainSequences]:
    """Read what `save_sequences` wrote, by domain; empty without a file. Raises DataError for other content."""
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
    """Mean and standard error of second - first over the same sequences; None if the sequences differ."""
    if first is None or second is None or other_text(first, second):
        return None
    return mean_and_error(second.loss_N - first.loss_N)


def other_text(first: DomainSequences | None, second: DomainSequences | None) -> bool:
    """Whether two evaluations are known to be of different sequences."""
    if first is None or second is None:
        return False
    return first.text != second.text or len(first.loss_N) != len(second.loss_N)


def loss_table(columns: Mapping[str, Losses]) -> str:
    """Table of held-out loss with error, and perplexity, by domain (rows) and model (columns).

    The last row is the mean over domains that every column has, with the error of independent domains. A missing
    domain is `-`.

    Args:
        columns: Name of the model -> {domain: (loss in nats per token, its standard error)}.
    """
    domains = list(dict.fromkeys(domain for losses in columns.values() for domain in losses))
    rows = [
        [domain, *(cell for losses in columns.values() for cell in loss_cells(losses.get(domain)))]
        for domain in domains
    ]
    shared = [domain for domain in domains if all(domain in losses for losses in columns.values())]
    if len(shared) > 1:
        means = [mean_of([losses[domain] for domain in shared]) for losses in columns.values()]
        rows.append([f"mean of {len(shared)}", *(cell for mean in means for cell in loss_cells(mean))])
    header = ["domain", *(text for name in columns for text in (name, "ppl"))]
    return table("Held-out loss (nats per token, +- standard error) and perplexity", header, rows)


def loss_cells(loss: tuple[float, float] | None) -> list[str]:
    """Loss with its standard error, and perplexity; `-` if it is missing or not finite."""
    if loss is None or not math.isfinite(loss[0]):
        return ["-", "-"]
    perplexity = math.exp(min(loss[0], 700.0))
    return [with_error(*loss), f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"]


def with_error(value: float, error: float, sign: str = "-") -> str:
    """A number with its standard error if known; `sign="+"` shows the sign."""
    shown = f"{value:{sign}.4f}"
    return f"{shown} +- {error:.4f}" if math.isfinite(error) else shown
