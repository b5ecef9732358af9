"""Stages of a run: which there are, what divides, what fits into the steps, and what null stands for.

Read next: `schema.py` (the keys), `check.py`.
"""

from collections.abc import Collection
from pathlib import Path

from megashear.config.closing import closing_problems
from megashear.config.legality import either, near_multiples
from megashear.config.paper import PAPER
from megashear.config.presets import PRESETS
from megashear.config.schema import STAGES, Config, ParallelConfig
from megashear.config.training_schema import BatchConfig, OptimizerConfig, PretrainConfig, PruneConfig

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


def importance_problems(config: Config, world_size: int | None) -> list[str]:
    """What stops units from being scored, in a run that prunes."""
    if "prune" not in config.run.stages:
        return []
    prune, problems = config.prune, []
    if prune.importance.criterion is None and prune.importance.layer_criterion is not None:
        problems.append(
            f"prune.importance.layer_criterion: {prune.importance.layer_criterion}, but prune.importance.criterion is "
            "null and nothing is scored; set both, or none"
        )
    if prune.method != "one_shot":
        return problems
    if prune.importance.criterion is None:
        problems.append(
            "prune.method: one_shot keeps the units of the highest score, and prune.importance.criterion is null; name "
            "a criterion, for instance taylor_mask"
        )
    if config.source.folder is None:
        problems.append(
            "prune.method: one_shot scores the source's weights, and source.folder is null; give the folder of an "
            "imported model"
        )
    return problems + batch_problems("prune", prune.batch, config.parallel, world_size)


def batch_problems(stage: str, batch: BatchConfig, parallel: ParallelConfig, world_size: int | None) -> list[str]:
    """What does not divide: the global batch over ranks and micro-batches, micro-batches over a virtual pipeline."""
    replica = parallel.tensor * parallel.pipeline
    if world_size is None or world_size % replica:  # the layout's own problem is reported with the shapes
        return []
    data_parallel = world_size // replica
    at_once = batch.micro_batch * data_parallel
    if batch.global_batch % at_once:
        return [
            f"{stage}.batch.global_batch: {batch.global_batch} is not divisible by micro_batch {batch.micro_batch} x "
            f"{data_parallel} data-parallel ranks = {at_once}; "
            f"use {either(near_multiples(batch.global_batch, at_once))}"
        ]
    count = batch.global_batch // at_once
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        legal = [near * at_once for near in near_multiples(count, parallel.pipeline)]
        return [
            f"{stage}.batch.global_batch: {batch.global_batch} makes {count} micro-batches, and virtual_pipeline needs "
            f"a multiple of parallel.pipeline {parallel.pipeline}; use {either(legal)}"
        ]
    return []


def schedule_problems(config: Config, stage: str, optimizer: OptimizerConfig, batch: BatchConfig) -> list[str]:
    """Warm-ups and decays that do not fit into the steps."""
    problems = []
    warmup, decay = optimizer.warmup_steps or 0, optimizer.decay_steps or 0
    if warmup >= batch.steps:
        problems.append(
            f"{stage}.optimizer.warmup_steps: {warmup} leaves nothing of {batch.steps} steps; use fewer, or null"
        )
    elif optimizer.schedule == "wsd" and warmup + decay > batch.steps:
        problems.append(
            f"{stage}.optimizer.decay_steps: {decay} and a warm-up of {warmup} are more than {batch.steps} steps; "
            f"use at most {batch.steps - warmup}"
        )
    return problems + (closing_problems(config.prune) if stage == "prune" else [])


def teacher_problems(config: Config, stage: str) -> list[str]:
    """A teacher that is not there: it is the model of the source's folder."""
    weight = training_stages(config)[stage].distillation.weight
    if not weight or config.source.folder is not None:
        return []
    return [
        f"{stage}.distillation.weight: {weight:g}, but a run from scratch has no source to be the teacher; set it to "
        "0, or give source.folder"
    ]
