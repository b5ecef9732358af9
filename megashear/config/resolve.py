"""Phases of a run: which there are, what divides, what fits into the steps, and what null stands for.

Read next: `schema.py` (the keys), `check.py`.

What an open `distillation.weight` stands for: whether the source teaches the model that is made of it.

Of equal text, a taught model is the better one while it is worse than its source, which has seen more text than the run
takes; of equal compute too where that is much more (`docs/results.md`, where both bounds are measured). Key property:
once a run has started, the answer is the one that it recorded. Read next: `training_schema.py`, `../train/teacher.py`.
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
"""File in a phase's folder that tells it is finished."""
IDENTITY = "identity.json"
FORMAT_VERSION = 1
"""Of a run folder: its records and checkpoints. A folder of another version is refused."""
"""File in a run's folder that tells what the run computes, written at its first start."""


def known_phases(folder: Path, named: Collection[str]) -> list[str]:
    """Phases of the run in `folder`, in order: those that its run file names, and those done before.

    `run.phases` may change between starts, so what a run has come to is not told by the phases named now alone.
    """
    return [phase for phase in PHASES if phase in named or (folder / phase / DONE).is_file()]


def run_prunes(config: Config) -> bool:
    """Whether the run makes its target, now or before: then pre-training continues the target, else the source."""
    return bool({"prune", "finalize"} & set(known_phases(Path(config.run.folder), config.run.phases)))


def refit_batches(prune: PruneConfig) -> int:
    """Calibration batches on which output matrices are fitted, by `prune.refit`, whose text says what null means."""
    if prune.method != "one_shot":
        return 0
    return 16 if prune.refit is None else prune.refit


def peak_learning_rate(optimizer: OptimizerConfig, hidden_size: int) -> float:
    """Peak learning rate of the weights; see `optimizer.learning_rate` for what null means.

    hidden_size: of the model that the run makes. The published rate belongs to a target of 2,560 hidden units; Adam's
    best rate for a matrix falls as its fan-in grows (Yang et al. 2022, arXiv 2203.03466, table 3).
    """
    if optimizer.learning_rate is not None:
        return optimizer.learning_rate
    published: float = PAPER["optimizer"]["learning_rate"]
    return published * PRESETS["sheared-2.7b"].hidden_size / hidden_size


def training_phases(config: Config) -> dict[str, PruneConfig | PretrainConfig]:
    """The sections of the phases that train, of those that the run names, in order; one-shot pruning does not train."""
    sections: dict[str, PruneConfig | PretrainConfig] = {"prune": config.prune, "pretrain": config.pretrain}
    if config.prune.method == "one_shot":
        del sections["prune"]
    return {name: section for name, section in sections.items() if name in config.run.phases}


def phase_tokens(batch: BatchConfig, sequence_length: int) -> int:
    """Tokens that a phase trains on."""
    return batch.steps * batch.global_batch * sequence_length


def run_tokens(config: Config) -> int:
    """Tokens that the run's phases train on."""
    return sum(phase_tokens(phase.batch, config.data.sequence_length) for phase in training_phases(config).values())


LAGRANGIAN_WARMUP_SHARE = 0.2
"""Sparsity warm-up under `lagrangian` as a share of the steps, as published (640 of 3200)."""
PROJECTED_WARMUP_SHARE = 0.5
FROZEN_SHARE = 0.1
"""Last steps with fixed masks, as a share of the steps."""


def sparsity_warmup_length(prune: PruneConfig) -> int:
    """Steps over which target sparsities grow: by default a share of all, and no more than masks are learned in."""
    if prune.sparsity_warmup_steps is not None:
        return prune.sparsity_warmup_steps
    steps = prune.batch.steps
    share = PROJECTED_WARMUP_SHARE if prune.constraint == "projected" else LAGRANGIAN_WARMUP_SHARE
    return min(int(steps * share), steps - (prune.settle_steps or 0))


def frozen_steps(prune: PruneConfig) -> int:
    """Last steps with fixed masks: by default a share of all, one at least, and no more than closing leaves."""
    if prune.settle_steps is not None:
        return prune.settle_steps
    steps = prune.batch.steps
    return min(max(1, int(steps * FROZEN_SHARE)), steps - (prune.sparsity_warmup_steps or 0))


WEIGHT = 0.5
MAX_TEACHER_COST = 1.0
"""FLOPs of the source's forward pass, as a share of those of training the target, up to which it teaches unasked."""
DEFAULT_WEIGHT_KEY = "open_distillation_weight"
"""Key of a run's record: what the run settled for an open weight."""


@dataclass(frozen=True)
class DistillationPlan(DistillationConfig):
    """How the source teaches a phase, with the weight that counts."""

    weight: float = 0.0


def distillation_plans(
    config: Config, source: ModelShape | None, target: ModelShape | None
) -> dict[str, DistillationPlan]:
    """How the source teaches `prune` and `pretrain`; see `distillation.weight` for what null means.

    source, target: None where the run has none of its own, or they are not known; an open weight is 0 then, as it is
    where the source has no folder: weights out of the seed teach nothing.
    """
    weight = default_distillation_weight(config, source, target)
    pruning = _settled(config.prune.distillation, weight)
    follows = weight if target is None else pruning.weight
    return {"prune": pruning, "pretrain": _settled(config.pretrain.distillation, follows)}


def default_distillation_weight(config: Config, source: ModelShape | None, target: ModelShape | None) -> float:
    """The weight that an open one stands for.

    A run's first start settles it: `run.phases` may change between starts, and with it the tokens that the run takes,
    as may the source's folder.
    """
    folder, length = config.source.folder, config.data.sequence_length
    if source is None or target is None or folder is None:
        return 0.0
    record = _record(Path(config.run.folder) / IDENTITY)
    if isinstance(settled := record.get(DEFAULT_WEIGHT_KEY), int | float):
        return float(settled)
    seen = training_tokens_of(Path(folder))
    affordable = teacher_flops_per_token(source, length) <= MAX_TEACHER_COST * target.flops_per_token(length)
    return WEIGHT if affordable and (seen is None or run_tokens(config) < seen) else 0.0


def teacher_flops_per_token(source: ModelShape, sequence_length: int) -> float:
    """FLOPs of a teacher's forward pass per token: a third of what training it would take."""
    return source.flops_per_token(sequence_length) / 3


def training_tokens_of(folder: Path) -> int | None:
    """Tokens that a model was trained on, as far back as to random weights; None where its manifest does not tell."""
    try:
        made = read_manifest(folder, ModelError)["provenance"]
        before = made["source"]["tokens"] if "source" in made else 0
        tokens = int(before + sum(phase.get("tokens", 0) for phase in made["phases"]))
    except (ModelError, KeyError, TypeError, AttributeError, ValueError, OverflowError):  # foreign, or imported
        return None
    return tokens if tokens >= 0 else None


def _record(path: Path) -> dict[str, Any]:
    """What a run's first start recorded; empty where it has not started, or where `run` is to refuse the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _settled(how: DistillationConfig, weight: float) -> DistillationPlan:
    return DistillationPlan(**vars(how) | {"weight": weight if how.weight is None else how.weight})


def in_principal_basis(config: PruneConfig, source: ModelShape, target: ModelShape) -> bool:
    """Whether pruning starts from the source's principal basis, by `config.basis`, whose text says what null means."""
    if config.basis is not None:
        return config.basis == "principal"
    return target.hidden_size < source.hidden_size
