"""Check a run file before anything is launched: shapes, layout, batches, schedules, mixture, data.

Runs on a laptop without torch. What cannot be checked there (weights, data, ranks) is listed in `Report.not_checked`.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megashear.config.model_shape import ModelShape
from megashear.config.presets import resolve_shape
from megashear.config.resolve import distillation_plans, refit_batches, run_prunes, training_phases
from megashear.config.schema import PHASES, Config, ShapeConfig
from megashear.config.shape_legality import granularity_problems, shape_problems
from megashear.config.training_schema import BatchConfig
from megashear.errors import ConfigError, DataError
from megashear.planning.calibration_cost import PASSES, criteria_of
from megashear.planning.dataset_plan import Dataset, dataset_problems, dataset_warnings, read_dataset
from megashear.planning.memory_estimate import Memory, Work, one_shot_memory, stage_memory
from megashear.planning.mixture_checks import mixture_problems
from megashear.planning.phase_checks import (
    batch_problems,
    distillation_problems,
    importance_problems,
    schedule_problems,
)
from megashear.planning.unused_keys import distillation_warnings, moments_warnings, pruning_warnings


@dataclass
class Report:
    """Result of a check: `problems` stop a run, `warnings` do not, `not_checked` could not be checked here."""

    source: ModelShape | None = None
    target: ModelShape | None = None
    world_size: int | None = None
    dataset: Dataset | None = None
    memory: dict[str, list[Memory]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)


def check(config: Config, source_shape: ModelShape | None, world_size: int | None) -> Report:
    """Check all sections against each other.

    Args:
        config: Configuration.
        source_shape: Shape of the source folder; None if it is not available, then `source.shape` is used.
        world_size: Launched ranks; None: `parallel.world_size`.

    Returns:
        The report.

    Raises:
        ConfigError: There are problems; the error lists all of them.
    """
    report = examine(config, source_shape, world_size)
    if report.problems:
        raise ConfigError(report.problems)
    return report


def examine(config: Config, source_shape: ModelShape | None, world_size: int | None) -> Report:
    """Like `check`, with the problems in the report."""
    report = Report()
    _world(config, world_size, report)
    _data(config, report)
    _shapes(config, source_shape, report)
    report.problems += _phase_order(config.run.phases)
    report.problems += mixture_problems(config)
    report.problems += importance_problems(config, report.world_size)
    if report.source is not None and report.target is not None:
        report.warnings += pruning_warnings(config, report.source, report.target)
    report.warnings += distillation_warnings(config, report.source, report.target) + moments_warnings(config)
    for name, phase in training_phases(config).items():
        report.problems += schedule_problems(config, name, phase.optimizer, phase.batch)
        report.problems += batch_problems(name, phase.batch, config.parallel, report.world_size)
        report.problems += distillation_problems(config, name)
        if phase.batch.eval_interval > phase.batch.steps and config.mixture.rule != "static":
            when = "before the first step alone" if name == "pretrain" else "never in this phase"
            report.warnings.append(
                f"{name}.batch.eval_interval: {phase.batch.eval_interval} is more than the {phase.batch.steps} steps, "
                f"so the mixture's weights change {when}"
            )
    if not report.problems:
        _estimate_memory(config, report)
    return report


def _phase_order(phases: list[str]) -> list[str]:
    if not phases:
        return [f"run.phases: the list is empty; name some of {', '.join(PHASES)}"]
    ordered = [phase for phase in PHASES if phase in phases]
    if phases != ordered:
        return [f"run.phases: {', '.join(phases)} are not in order or not distinct; write [{', '.join(ordered)}]"]
    return []


def _world(config: Config, launched: int | None, report: Report) -> None:
    planned = config.parallel.world_size
    if launched is not None and planned is not None and launched != planned:
        report.problems.append(
            f"parallel.world_size: {planned}, but {launched} ranks were launched; launch {planned}, or set it to null"
        )
    report.world_size = planned if launched is None else launched
    if report.world_size is None:
        report.not_checked.append("batches and memory per rank: set parallel.world_size to the ranks you will launch")


def _data(config: Config, report: Report) -> None:
    phases = {name: phase.batch for name, phase in training_phases(config).items()}
    if config.data.repeat_limit is not None and config.data.exhausted != "repeat":
        report.problems.append(
            f"data.repeat_limit: {config.data.repeat_limit}, but data.exhausted is {config.data.exhausted}; a limit is "
            "for `repeat`, set one of them"
        )
    if config.data.folder is None:
        if phases or "prune" in config.run.phases:
            report.problems.append("data.folder: missing; give a folder made by tools/preprocess_data.py")
        return
    folder = Path(config.data.folder)
    if not folder.is_dir():
        report.not_checked.append(f"domains and tokens: {folder} is not on this machine")
        return
    try:
        report.dataset = read_dataset(folder)
    except DataError as error:
        report.problems.append(f"data.folder: {error}")
        return
    report.warnings += dataset_warnings(config, report.dataset, phases)


def _shapes(config: Config, source_shape: ModelShape | None, report: Report) -> None:
    try:
        report.source = _source(config, source_shape, report)
    except ConfigError as error:
        report.problems += error.problems
    source = report.source
    if run_prunes(config) and config.target == ShapeConfig():
        report.problems.append("target: missing; name a preset (`megashear check --presets`) or give sizes")
    elif run_prunes(config) and source is not None:
        try:
            report.target = resolve_shape(config.target, source)
        except ConfigError as error:
            report.problems += error.problems
    if source is not None:
        report.problems += shape_problems(source, report.target, config.parallel, report.world_size)
    if source is not None and report.target is not None:
        report.problems += granularity_problems(source, report.target, config.prune.granularities)
    if report.dataset is not None:
        report.problems += dataset_problems(config, report.dataset, None if source is None else source.vocab_size)


def _source(config: Config, found: ModelShape | None, report: Report) -> ModelShape | None:
    """Shape of the source folder, or of `source.shape`; None if neither is available, which is noted."""
    vocab = None if report.dataset is None else report.dataset.vocab_size
    given = config.source.shape != ShapeConfig()
    if config.source.folder is None:
        if not given:
            report.problems.append("source: neither folder nor shape; give the folder of an imported model, or a shape")
            return None
        return resolve_shape(config.source.shape, None, vocab)
    if found is None:
        report.not_checked.append(f"weights: {config.source.folder} is not on this machine")
        if given:
            return resolve_shape(config.source.shape, None)
        report.not_checked.append("shapes and layout: give source.shape to check them without the weights")
        return None
    if given:
        expected = resolve_shape(config.source.shape, None)
        differing = [f.name for f in fields(ModelShape) if getattr(expected, f.name) != getattr(found, f.name)]
        if differing:
            report.warnings.append(
                f"source.shape: {', '.join(differing)} differ from {config.source.folder}, whose config.json counts"
            )
    return found


def _estimate_memory(config: Config, report: Report) -> None:
    """Estimate memory of the training phases and of one-shot pruning."""
    if report.world_size is None:
        return
    source, target, prune = report.source, report.target, config.prune
    if "prune" in config.run.phases and prune.method == "one_shot" and source is not None and target is not None:
        gradients = any(PASSES[one] > 1 for one in criteria_of(prune.importance, source).values())
        work, fits = _work(config, report.world_size, prune.batch), refit_batches(prune) > 0
        report.memory["prune"] = one_shot_memory(source, target, config.parallel, work, gradients, fits)
    plans = distillation_plans(config, source, target)
    for name, phase in training_phases(config).items():
        shape = target if name == "pretrain" and run_prunes(config) else source
        if shape is None:
            continue
        work = replace(
            _work(config, report.world_size, phase.batch),
            masked=name == "prune",
            teacher=source if plans[name].weight else None,
            chunk=phase.distillation.chunk,
        )
        report.memory[name] = stage_memory(shape, config.parallel, work)


def _work(config: Config, world_size: int, batch: BatchConfig) -> Work:
    """Work of a rank in a step, without masks and teacher."""
    data_parallel = world_size // (config.parallel.tensor * config.parallel.pipeline)
    return Work(
        micro_batch=batch.micro_batch,
        micro_batches=batch.global_batch // (batch.micro_batch * data_parallel),
        sequence_length=config.data.sequence_length,
        data_parallel=data_parallel,
        precision=config.precision,
        masked=True,
    )
