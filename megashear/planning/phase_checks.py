"""Check the training phases: batches divide over ranks, schedules fit into the steps, teacher and scores exist."""

from megashear.config.resolve import frozen_steps, training_phases
from megashear.config.schema import Config, ParallelConfig
from megashear.config.shape_legality import either, near_multiples
from megashear.config.training_schema import BatchConfig, OptimizerConfig, PruneConfig


def importance_problems(config: Config, world_size: int | None) -> list[str]:
    """Problems that prevent units from being scored, in a run that prunes."""
    if "prune" not in config.run.phases:
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


def batch_problems(phase: str, batch: BatchConfig, parallel: ParallelConfig, world_size: int | None) -> list[str]:
    """Sizes that do not divide: global batch over ranks and micro-batches, micro-batches over a virtual pipeline."""
    replica = parallel.tensor * parallel.pipeline
    if world_size is None or world_size % replica:  # the layout's own problem is reported with the shapes
        return []
    data_parallel = world_size // replica
    at_once = batch.micro_batch * data_parallel
    if batch.global_batch % at_once:
        return [
            f"{phase}.batch.global_batch: {batch.global_batch} is not divisible by micro_batch {batch.micro_batch} x "
            f"{data_parallel} data-parallel ranks = {at_once}; "
            f"use {either(near_multiples(batch.global_batch, at_once))}"
        ]
    count = batch.global_batch // at_once
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        legal = [near * at_once for near in near_multiples(count, parallel.pipeline)]
        return [
            f"{phase}.batch.global_batch: {batch.global_batch} makes {count} micro-batches, and virtual_pipeline needs "
            f"a multiple of parallel.pipeline {parallel.pipeline}; use {either(legal)}"
        ]
    return []


def schedule_problems(config: Config, phase: str, optimizer: OptimizerConfig, batch: BatchConfig) -> list[str]:
    """Warm-ups and decays that do not fit into the steps."""
    problems = []
    warmup, decay = optimizer.warmup_steps or 0, optimizer.decay_steps or 0
    if warmup >= batch.steps:
        problems.append(
            f"{phase}.optimizer.warmup_steps: {warmup} leaves nothing of {batch.steps} steps; use fewer, or null"
        )
    elif optimizer.schedule == "wsd" and warmup + decay > batch.steps:
        problems.append(
            f"{phase}.optimizer.decay_steps: {decay} and a warm-up of {warmup} are more than {batch.steps} steps; "
            f"use at most {batch.steps - warmup}"
        )
    return problems + (schedule_length_problems(config.prune) if phase == "prune" else [])


def distillation_problems(config: Config, phase: str) -> list[str]:
    """A teacher without a source folder."""
    weight = training_phases(config)[phase].distillation.weight
    if not weight or config.source.folder is not None:
        return []
    return [
        f"{phase}.distillation.weight: {weight:g}, but a run from scratch has no source to be the teacher; set it to "
        "0, or give source.folder"
    ]


def schedule_length_problems(prune: PruneConfig) -> list[str]:
    """Mask schedules that do not fit into the steps, and granularities listed twice."""
    problems, steps = [], prune.batch.steps
    sparsity, settled, closing = (
        prune.sparsity_warmup_steps or 0,
        prune.freeze_steps or 0,
        prune.granularity_order or [],
    )
    if sparsity >= steps:
        problems.append(
            f"prune.sparsity_warmup_steps: {sparsity} of {steps} steps leaves none at the full target; "
            "use fewer, or null"
        )
    elif settled >= steps:
        problems.append(f"prune.freeze_steps: {settled} of {steps} steps leaves none to learn in; use fewer, or null")
    elif settled and sparsity + settled > steps:
        problems.append(
            f"prune.freeze_steps: {settled} and a sparsity warm-up of {sparsity} are more than {steps} steps: masks "
            f"would be fixed before they are at their target; use at most {steps - sparsity}, or null"
        )
    elif frozen_steps(prune) >= steps and prune.importance.criterion is None:
        problems.append(
            f"prune.batch.steps: {steps} leaves none in which masks are learned, and prune.importance.criterion is "
            "null, so that units would be kept by chance; use more steps, or name a criterion"
        )
    twice = sorted({name for name in closing if closing.count(name) > 1})
    if twice:
        problems.append(f"prune.granularity_order: {', '.join(twice)} more than once; name each granularity once")
    return problems
