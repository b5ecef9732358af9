"""What an open `distillation.weight` stands for: whether the source teaches the model that is made of it.

Of equal text, a taught model is the better one while it is worse than its source, which has seen more text than the run
takes; of equal compute too where that is much more (`docs/results.md`, where both bounds are measured). Key property:
once a run has started, the answer is the one that it recorded. Read next: `training_schema.py`, `../train/teacher.py`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.config.dataset import run_tokens
from megashear.config.schema import Config
from megashear.config.shape import ModelShape
from megashear.config.stages import IDENTITY
from megashear.config.training_schema import DistillationConfig
from megashear.errors import ModelError
from megashear.files.manifest import read_manifest

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
