"""Derive the values of unset keys, and the phases and tokens of a run.

Functions here return the configured value of a key, or the derived one if it is unset. The default distillation weight
is 0.5 if the source is expected to improve the target at equal tokens (bounds measured in `docs/results.md`). It is
recorded at the run's first start and does not change afterwards.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PAPER, PRESETS
from megashear.config.schema import PHASES, Config
from megashear.config.training_schema import (
    BatchConfig,
    DistillationConfig,
    OptimizerConfig,
    PretrainConfig,
    PruneConfig,
)
from megashear.errors import ModelError
from megashear.files.file_digests import read_manifest

DONE = "done.json"
"""File that marks a phase's folder as finished."""
IDENTITY = "identity.json"
"""File in a run's folder that records the config that determines its results, written at the first start."""
FORMAT_VERSION = 1
"""Version of a run folder's records and checkpoints; other versions are refused."""


def known_phases(folder: Path, named: Collection[str]) -> list[str]:
    """Return the phases of the run in `folder`, in order: those in `named` and those already finished.

    `run.phases` may change between starts, so finished phases need not be in `named`.
    """
    return [phase for phase in PHASES if phase in named or (folder / phase / DONE).is_file()]


def run_prunes(config: Config) -> bool:
    """Return whether the run prunes, now or earlier; then pre-training continues the target, else the source."""
    return bool({"prune", "finalize"} & set(known_phases(Path(config.run.folder), config.run.phases)))


def refit_batches(prune: PruneConfig) -> int:
    """Return the number of calibration batches for refitting output matrices (`prune.refit`)."""
    if prune.method != "one_shot":
        return 0
    return 16 if prune.refit is None else prune.refit


def peak_learning_rate(optimizer: OptimizerConfig, hidden_size: int) -> float:
    """Return the peak learning rate of the weights (`optimizer.learning_rate`).

    By default the published rate for hidden size 2560, scaled inversely with the hidden size, since Adam's best rate
    for a matrix falls as its fan-in grows (Yang et al. 2022, arXiv 2203.03466, table 3).

    Args:
        optimizer: The phase's optimizer section.
        hidden_size: Hidden size of the target, or of the model trained if the run does not prune.
    """
    if optimizer.learning_rate is not None:
        return optimizer.learning_rate
    published: float = PAPER["optimizer"]["learning_rate"]
    return published * PRESETS["sheared-2.7b"].hidden_size / hidden_size


def training_phases(config: Config) -> dict[str, PruneConfig | PretrainConfig]:
    """Return the sections of the run's training phases by name, in order; one-shot pruning does not train."""
    sections: dict[str, PruneConfig | PretrainConfig] = {"prune": config.prune, "pretrain": config.pretrain}
    if config.prune.method == "one_shot":
        del sections["prune"]
    return {name: section for name, section in sections.items() if name in config.run.phases}


def phase_tokens(batch: BatchConfig, sequence_length: int) -> int:
    """Return the number of tokens that a phase trains on."""
    return batch.steps * batch.global_batch * sequence_length


def run_tokens(config: Config) -> int:
    """Return the number of tokens that the run's phases train on."""
    return sum(phase_tokens(phase.batch, config.data.sequence_length) for phase in training_phases(config).values())


LAGRANGIAN_WARMUP_SHARE = 0.2
"""Sparsity warm-up under `lagrangian` as a fraction of the steps, as published (640 of 3200)."""
PROJECTED_WARMUP_SHARE = 0.5
FROZEN_SHARE = 0.1
"""Steps with frozen masks as a fraction of the steps."""


def sparsity_warmup_length(prune: PruneConfig) -> int:
    """Return the steps over which target sparsities grow, at most those before masks are frozen."""
    if prune.sparsity_warmup_steps is not None:
        return prune.sparsity_warmup_steps
    steps = prune.batch.steps
    share = PROJECTED_WARMUP_SHARE if prune.constraint == "projected" else LAGRANGIAN_WARMUP_SHARE
    return min(int(steps * share), steps - (prune.freeze_steps or 0))


def frozen_steps(prune: PruneConfig) -> int:
    """Return the final steps with frozen masks; by default at least 1, at most those after the sparsity warm-up."""
    if prune.freeze_steps is not None:
        return prune.freeze_steps
    steps = prune.batch.steps
    return min(max(1, int(steps * FROZEN_SHARE)), steps - (prune.sparsity_warmup_steps or 0))


WEIGHT = 0.5
"""Default distillation weight if distillation is worthwhile."""
MAX_TEACHER_COST = 1.0
"""Distil by default if the teacher's forward FLOPs are at most this multiple of the target's training FLOPs."""
DEFAULT_WEIGHT_KEY = "open_distillation_weight"
"""Key in identity.json under which the derived weight is recorded."""


@dataclass(frozen=True)
class DistillationPlan(DistillationConfig):
    """Distillation settings of a phase with the resolved weight."""

    weight: float = 0.0


def distillation_plans(
    config: Config, source: ModelShape | None, target: ModelShape | None
) -> dict[str, DistillationPlan]:
    """Resolve distillation of `prune` and `pretrain`.

    An unset weight is 0 if a shape is unknown, or if the source has no folder, since random weights teach nothing.

    Args:
        config: The run's config.
        source, target: Shapes; None if the run has no such model or its shape is unknown.
    """
    weight = default_distillation_weight(config, source, target)
    pruning = _resolved_plan(config.prune.distillation, weight)
    pretrain_default = weight if target is None else pruning.weight
    return {"prune": pruning, "pretrain": _resolved_plan(config.pretrain.distillation, pretrain_default)}


def default_distillation_weight(config: Config, source: ModelShape | None, target: ModelShape | None) -> float:
    """Return the derived weight, recorded by the run's first start if it has started.

    The record matters because `run.phases`, and with it the number of tokens, may change between starts.
    """
    folder, length = config.source.folder, config.data.sequence_length
    if source is None or target is None or folder is None:
        return 0.0
    record = _record(Path(config.run.folder) / IDENTITY)
    if isinstance(recorded := record.get(DEFAULT_WEIGHT_KEY), int | float):
        return float(recorded)
    seen = training_tokens_of(Path(folder))
    affordable = teacher_flops_per_token(source, length) <= MAX_TEACHER_COST * target.flops_per_token(length)
    return WEIGHT if affordable and (seen is None or run_tokens(config) < seen) else 0.0


def teacher_flops_per_token(source: ModelShape, sequence_length: int) -> float:
    """Return the FLOPs of a teacher's forward pass per token, a third of those of training it."""
    return source.flops_per_token(sequence_length) / 3


def training_tokens_of(folder: Path) -> int | None:
    """Return the tokens that a model was trained on since random weights; None if its manifest does not record them."""
    try:
        provenance = read_manifest(folder, ModelError)["provenance"]
        before = provenance["source"]["tokens"] if "source" in provenance else 0
        tokens = int(before + sum(phase.get("tokens", 0) for phase in provenance["phases"]))
    except (ModelError, KeyError, TypeError, AttributeError, ValueError, OverflowError):  # foreign, or imported
        return None
    return tokens if tokens >= 0 else None


def _record(path: Path) -> dict[str, Any]:
    """Return the record of a run's first start; empty if it has none or an invalid one (refused by `run`)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _resolved_plan(section: DistillationConfig, weight: float) -> DistillationPlan:
    return DistillationPlan(**vars(section) | {"weight": weight if section.weight is None else section.weight})


def in_principal_basis(config: PruneConfig, source: ModelShape, target: ModelShape) -> bool:
    """Return whether pruning starts from the source's principal basis (`prune.basis`)."""
    if config.basis is not None:
        return config.basis == "principal"
    return target.hidden_size < source.hidden_size
