"""Stages of a run: which there are, what divides, what fits into the steps, and what null stands for.

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
from megashear.config.schema import STAGES, Config
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
"""File in a stage's folder that tells it is finished."""
IDENTITY = "identity.json"
FORMAT_VERSION = 1
"""Of a run folder: its records and checkpoints. A folder of another version is refused."""
"""File in a run's folder that tells what the run computes, written at its first start."""


def known_stages(folder: Path, named: Collection[str]) -> list[str]:
    """Stages of the run in `folder`, in order: those that its run file names, and those done before.

    `run.stages` may change between starts, so what a run has come to is not told by the stages named now alone.
    """
    return [stage for stage in STAGES if stage in named or (folder / stage / DONE).is_file()]


def prunes(config: Config) -> bool:
    """Whether the run makes its target, now or before: then pre-training continues the target, else the source."""
    return bool({"prune", "finalize"} & set(known_stages(Path(config.run.folder), config.run.stages)))


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


def training_stages(config: Config) -> dict[str, PruneConfig | PretrainConfig]:
    """The sections of the stages that train, of those that the run names, in order; one-shot pruning does not train."""
    sections: dict[str, PruneConfig | PretrainConfig] = {"prune": config.prune, "pretrain": config.pretrain}
    if config.prune.method == "one_shot":
        del sections["prune"]
    return {name: section for name, section in sections.items() if name in config.run.stages}


def stage_tokens(batch: BatchConfig, sequence_length: int) -> int:
    """Tokens that a stage trains on."""
    return batch.steps * batch.global_batch * sequence_length


def run_tokens(config: Config) -> int:
    """Tokens that the run's stages train on."""
    return sum(stage_tokens(stage.batch, config.data.sequence_length) for stage in training_stages(config).values())


LAGRANGIAN_WARMUP_SHARE = 0.2
"""Sparsity warm-up under `lagrangian` as a share of the steps, as published (640 of 3200)."""
PROJECTED_WARMUP_SHARE = 0.5
SETTLE_SHARE = 0.1
"""Last steps with fixed masks, as a share of the steps."""


def closing_steps(prune: PruneConfig) -> int:
    """Steps over which target sparsities grow: by default a share of all, and no more than masks are learned in."""
    if prune.sparsity_warmup_steps is not None:
        return prune.sparsity_warmup_steps
    steps = prune.batch.steps
    share = PROJECTED_WARMUP_SHARE if prune.constraint == "projected" else LAGRANGIAN_WARMUP_SHARE
    return min(int(steps * share), steps - (prune.settle_steps or 0))


def settled_steps(prune: PruneConfig) -> int:
    """Last steps with fixed masks: by default a share of all, one at least, and no more than closing leaves."""
    if prune.settle_steps is not None:
        return prune.settle_steps
    steps = prune.batch.steps
    return min(max(1, int(steps * SETTLE_SHARE)), steps - (prune.sparsity_warmup_steps or 0))


WEIGHT = 0.5
DEAREST = 1.0
"""FLOPs of the source's forward pass, as a share of those of training the target, up to which it teaches unasked."""
OPEN_WEIGHT = "open_distillation_weight"
"""Key of a run's record: what the run settled for an open weight."""


@dataclass(frozen=True)
class Teaching(DistillationConfig):
    """How the source teaches a stage, with the weight that counts."""

    weight: float = 0.0


def teaching(config: Config, source: ModelShape | None, target: ModelShape | None) -> dict[str, Teaching]:
    """How the source teaches `prune` and `pretrain`; see `distillation.weight` for what null means.

    source, target: None where the run has none of its own, or they are not known; an open weight is 0 then, as it is
    where the source has no folder: weights out of the seed teach nothing.
    """
    weight = open_weight(config, source, target)
    pruning = _settled(config.prune.distillation, weight)
    follows = weight if target is None else pruning.weight
    return {"prune": pruning, "pretrain": _settled(config.pretrain.distillation, follows)}


def open_weight(config: Config, source: ModelShape | None, target: ModelShape | None) -> float:
    """The weight that an open one stands for.

    A run's first start settles it: `run.stages` may change between starts, and with it the tokens that the run takes,
    as may the source's folder.
    """
    folder, length = config.source.folder, config.data.sequence_length
    if source is None or target is None or folder is None:
        return 0.0
    record = _record(Path(config.run.folder) / IDENTITY)
    if isinstance(settled := record.get(OPEN_WEIGHT), int | float):
        return float(settled)
    seen = tokens_seen(Path(folder))
    affordable = teacher_flops_per_token(source, length) <= DEAREST * target.flops_per_token(length)
    return WEIGHT if affordable and (seen is None or run_tokens(config) < seen) else 0.0


def teacher_flops_per_token(source: ModelShape, sequence_length: int) -> float:
    """FLOPs of a teacher's forward pass per token: a third of what training it would take."""
    return source.flops_per_token(sequence_length) / 3


def tokens_seen(folder: Path) -> int | None:
    """Tokens that a model was trained on, as far back as to random weights; None where its manifest does not tell."""
    try:
        made = read_manifest(folder, ModelError)["provenance"]
        before = made["source"]["tokens"] if "source" in made else 0
        tokens = int(before + sum(stage.get("tokens", 0) for stage in made["stages"]))
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


def _settled(how: DistillationConfig, weight: float) -> Teaching:
    return Teaching(**vars(how) | {"weight": weight if how.weight is None else how.weight})


def in_principal_basis(config: PruneConfig, source: ModelShape, target: ModelShape) -> bool:
    """Whether pruning starts from the source's principal basis, by `config.basis`, whose text says what null means."""
    if config.basis is not None:
        return config.basis == "principal"
    return target.hidden_size < source.hidden_size
