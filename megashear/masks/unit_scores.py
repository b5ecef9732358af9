"""Scores of units by importance criterion, the masks selected by them, and their file.

One schema for every criterion, with the shapes of log-alpha. Higher scores are kept, ties by lower index; units are
compared within their row. A file is safetensors with JSON metadata.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.errors import CheckpointError
from megashear.files.atomic import atomic_file
from megashear.masks.hard_concrete_masks import keep_largest
from megashear.masks.mask_specs import MaskSpec
from megashear.masks.mask_values import Masks, assemble

METADATA = "megashear"
"""Key of the safetensors metadata that holds the JSON."""


@dataclass(frozen=True)
class Scores:
    """Scores of every granularity of a model; fp32 tensors on the CPU."""

    units: dict[str, Tensor]
    """Granularity -> score of each unit, in log-alpha's shape: hidden [d], group [L, G], query [L, G, q], intermediate
    [L, I], layer [L]; no `query` under multi-head attention."""
    errors: dict[str, Tensor]
    """The score's standard error over calibration batches, of the same shapes; zeros where nothing was drawn."""
    criteria: dict[str, str]
    """Granularity -> criterion."""
    domains: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Domain -> granularity -> score on that domain's text alone; only domains that were drawn."""
    samples: dict[str, int] = field(default_factory=dict)
    """Domain -> calibration sequences of it."""


def open_units(
    scores: Mapping[str, Tensor], specs: Sequence[MaskSpec], source: ModelShape, principal: bool = False
) -> Masks:
    """Masks of exactly 1 for the best units of each row and 0 for the others, fp32; `principal` as in `assemble`."""
    values = {}
    for spec in specs:
        rows = scores[spec.name].reshape(spec.rows, spec.units)
        values[spec.name] = keep_largest(rows, spec.target_units).float().view(spec.shape)
    return assemble(values, source, principal)


def near_cut(scores: Scores, spec: MaskSpec) -> int:
    """Units whose score is within their standard error of their row's threshold, midway between kept and dropped."""
    rows = scores.units[spec.name].reshape(spec.rows, spec.units)
    ordered = rows.sort(dim=1, descending=True).values
    if spec.target_units == spec.units:
        return 0
    cut = (ordered[:, spec.target_units - 1] + ordered[:, spec.target_units]) / 2
    errors = scores.errors[spec.name].reshape(rows.shape)
    return int(((rows - cut[:, None]).abs() < errors).sum())


def save_scores(path: Path, scores: Scores, made_by: Mapping[str, Any]) -> None:
    """Write scores; `made_by` is JSON that describes what they were computed from."""
    tensors = {f"score/{name}": value for name, value in scores.units.items()}
    tensors |= {f"error/{name}": value for name, value in scores.errors.items()}
    for domain, units in scores.domains.items():
        tensors |= {f"domain/{name}/{domain}": value for name, value in units.items()}
    record = {"criteria": scores.criteria, "samples": scores.samples, "made_by": dict(made_by)}
    with atomic_file(path) as temporary:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata={METADATA: json.dumps(record)})


def load_scores(path: Path, advice: str = "remove it to compute them") -> tuple[Scores, dict[str, Any]]:
    """Load scores and `made_by`. Raises CheckpointError, ending in `advice`, without a valid file."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[METADATA])
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = file.get_tensor(name)
        scores = Scores(_part(tensors, "score/"), _part(tensors, "error/"), record["criteria"], {}, record["samples"])
        made_by = record["made_by"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; {advice}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no scores of units, or damaged ({error}); {advice}") from error
    for name in tensors:
        if name.startswith("domain/"):
            _, granularity, domain = name.split("/", 2)
            scores.domains.setdefault(domain, {})[granularity] = tensors[name]
    return scores, made_by


def _part(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def not_finite(scores: Scores) -> list[str]:
    """Granularities with a score that is not finite."""
    return [name for name, value in scores.units.items() if not bool(value.isfinite().all())]
