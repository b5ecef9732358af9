"""Tables that `megashear check` prints: shapes, layout, memory, cost, tokens, disk space."""

import math
from collections.abc import Mapping

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PRESETS
from megashear.config.resolve import (
    distillation_plans,
    in_principal_basis,
    peak_learning_rate,
    phase_tokens,
    refit_batches,
    run_prunes,
    teacher_flops_per_token,
    training_phases,
)
from megashear.config.schema import CheckpointConfig, Config, ParallelConfig
from megashear.config.training_schema import BatchConfig
from megashear.planning.calibration_cost import calibration_cost
from megashear.planning.check import Report
from megashear.planning.dataset_plan import planned_weights
from megashear.planning.memory_estimate import Memory
from megashear.planning.text_table import count, table

STATE_BYTES = {"bf16": 14, "fp32": 12}
"""Bytes of a checkpoint per parameter at most: weights, fp32 masters where they differ, Adam's two moments."""
STORED_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a model folder per parameter."""
FOLDED_BYTES = 4
"""The same of the model that finalisation cuts."""


def render(config: Config, report: Report) -> str:
    """All tables of a check, its warnings, and what was not checked."""
    phases = {name: phase.batch for name, phase in training_phases(config).items()}
    parts = []
    if report.source is not None:
        parts.append(shape_table(report.source, report.target))
    if phases:
        parts.append(phase_table(phases, learning_rates(config, report), config.data.sequence_length))
    if teachers := distillation_rows(config, report):
        header = ["", "share of the loss", "temperature", "stop when", "FLOPs/token", "of the teacher", "as a share"]
        parts.append(table("Teachers (FLOPs of training a token, and of the teacher's forward)", header, teachers))
    if rows := calibration_rows(config, report):
        parts.append(table("Calibration before pruning", ["", ""], rows))
    if report.world_size is not None:
        parts.append(layout_table(config.parallel, report.world_size))
    if report.memory:
        parts.append(memory_table(report.memory))
    if report.dataset is not None and phases:
        parts.append(epochs_table(_epochs(config, report, phases), config.data.max_epochs))
    if phases:
        parts.append(checkpoint_table(config.run.folder, config.checkpoint, phases))
    if phases and report.source is not None:
        parts.append(disk_table(config, report))
    notes = [f"warning: {text}" for text in report.warnings] + [f"not checked: {text}" for text in report.not_checked]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def learning_rates(config: Config, report: Report) -> dict[str, float]:
    """Peak learning rate of each training phase, if the shapes it is derived from are known."""
    made = report.target if report.target is not None else report.source
    if made is None:
        return {}
    phases = training_phases(config).items()
    return {name: peak_learning_rate(phase.optimizer, made.hidden_size) for name, phase in phases}


def memory_table(memory: dict[str, list[Memory]]) -> str:
    """Estimated GiB on a rank of each pipeline stage, by training phase."""
    header = ["phase", "parameters", "weights", "gradients", "optimizer", "activations", "logits", "teacher", "all"]
    rows = []
    for name, ranks in memory.items():
        for index, rank in enumerate(ranks):
            parts = (rank.weights, rank.gradients, rank.optimizer, rank.activations, rank.logits, rank.teacher)
            label = name if len(ranks) == 1 else f"{name}, pipeline {index}"
            rows.append([label, count(rank.parameters), *(f"{size / 2**30:.2f}" for size in (*parts, rank.total))])
    return table("Memory per rank, estimated (GiB, without CUDA's and NCCL's own)", header, rows)


def distillation_rows(config: Config, report: Report) -> list[list[str]]:
    """Cost of the teacher per phase that uses one; empty if shapes are unknown."""
    rows, plans = [], distillation_plans(config, report.source, report.target)
    for name in training_phases(config):
        plan = plans[name]
        if not plan.weight or report.source is None:
            continue
        student = report.target if name == "pretrain" and report.target is not None else report.source
        length = config.data.sequence_length
        own, extra = student.flops_per_token(length), teacher_flops_per_token(report.source, length)
        shares = [f"{plan.weight:g}", f"{plan.temperature:g}", plan.stop_when]
        rows.append([name, *shares, count(own), count(extra), f"{extra / own:.0%}"])
    return rows


def calibration_rows(config: Config, report: Report) -> list[list[str]]:
    """Cost of basis, scores and fit; empty if shapes are unknown or nothing is calibrated."""
    if "prune" not in config.run.phases or report.source is None or report.target is None:
        return []
    length, source, target = config.data.sequence_length, report.source, report.target
    directions = in_principal_basis(config.prune, source, target)
    cost = calibration_cost(config.prune, source, target, length, directions, config.precision)
    if not cost.tokens:
        return []
    trained = sum(
        phase_tokens(phase.batch, length) * (source if name == "prune" else target).flops_per_token(length)
        for name, phase in training_phases(config).items()
    )
    rows = [["tokens", count(cost.tokens)], ["FLOPs", f"{cost.flops:.2e}"]]
    if trained:
        rows.append(["as a share of the training's", f"{cost.flops / trained:.1%}"])
    if cost.host_bytes:
        whole = cost.host_bytes * config.parallel.tensor / 2**30
        rows.append(["host memory, over tensor- and data-parallel ranks", f"{whole:.2f} GiB"])
    return rows


def disk_table(config: Config, report: Report) -> str:
    """GiB of one checkpoint per phase, of all kept ones while another is written, and of model folders."""
    rows = []
    for name in training_phases(config):
        shape = report.target if name == "pretrain" and report.target is not None else report.source
        assert shape is not None
        size = STATE_BYTES[config.precision] * shape.parameters() / 2**30
        rows.append([name, f"{size:.1f}", f"{size * (config.checkpoint.keep + 1):.1f}"])
    rows.append(["models", "", f"{_model_bytes(config, report) / 2**30:.1f}"])
    return table("Disk space (GiB, at most)", ["", "a checkpoint", "at the peak"], rows)


def _model_bytes(config: Config, report: Report) -> float:
    """Bytes of a run's model folders at their peak, which is at finalize in a run that prunes."""
    assert report.source is not None
    size = STORED_BYTES[config.precision]
    if not run_prunes(config) or report.target is None:
        return size * report.source.parameters()
    rotated = in_principal_basis(config.prune, report.source, report.target)
    learned = config.prune.method == "learned"  # the masked model and two moments; both are cut with it
    copies = 3 if learned else int(refit_batches(config.prune) > 0)  # else the fitted source
    source = size * (rotated + copies) * report.source.parameters()
    return source + (FOLDED_BYTES + (2 * size if learned else 0)) * report.target.parameters()


def presets_table() -> str:
    """Table of the named shapes."""
    header = ["preset", "hidden", "layers", "heads", "groups", "head size", "intermediate", "vocabulary", "parameters"]
    rows = []
    for name, shape in PRESETS.items():
        sizes = [shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_query_groups, shape.head_dim]
        sizes += [shape.intermediate_size, shape.vocab_size]
        rows.append([name, *(str(size) for size in sizes), count(shape.parameters())])
    return table("Shapes", header, rows)


def _epochs(config: Config, report: Report, phases: dict[str, BatchConfig]) -> dict[str, dict[str, float]]:
    assert report.dataset is not None
    weights = planned_weights(config, report.dataset)
    there = {name: max(domain.train_tokens, 1) for name, domain in report.dataset.domains.items()}
    return {
        phase: {
            name: weight * phase_tokens(batch, config.data.sequence_length) / there[name]
            for name, weight in weights.items()
        }
        for phase, batch in phases.items()
    }


def shape_table(source: ModelShape, target: ModelShape | None) -> str:
    """Table of sizes and parameters of source and target, and the kept shares; `target` is None without pruning."""
    shapes = [shape for shape in (source, target) if shape is not None]
    sizes = {
        "hidden size": [shape.hidden_size for shape in shapes],
        "layers": [shape.num_layers for shape in shapes],
        "query heads": [shape.num_heads for shape in shapes],
        "key/value heads": [shape.num_query_groups for shape in shapes],
        "head size": [shape.head_dim for shape in shapes],
        "intermediate size": [shape.intermediate_size for shape in shapes],
        "vocabulary": [shape.vocab_size for shape in shapes],
        "parameters": [shape.parameters() for shape in shapes],
        "of them embeddings": [shape.embedding_parameters() for shape in shapes],
    }
    rows = [
        [name, *(f"{number:,}" for number in numbers), *(f"{number / numbers[0]:.1%}" for number in numbers[1:])]
        for name, numbers in sizes.items()
    ]
    return table("Model", ["", "source", "target", "kept"][: 2 * len(shapes)], rows)


def phase_table(phases: Mapping[str, BatchConfig], rates: Mapping[str, float], sequence_length: int) -> str:
    """Table of steps, sequences, tokens and peak learning rate of each training phase."""
    rows = []
    for name, batch in phases.items():
        tokens = batch.global_batch * sequence_length
        rows.append(
            [
                name,
                f"{batch.steps:,}",
                f"{batch.global_batch:,}",
                count(tokens),
                count(batch.steps * tokens),
                f"{batch.eval_interval:,}",
                f"{rates[name]:.2e}" if name in rates else "-",
            ]
        )
    header = ["", "steps", "sequences/step", "tokens/step", "tokens", "steps/evaluation", "learning rate"]
    return table(f"Phases (sequences of {sequence_length:,} tokens)", header, rows)


def layout_table(parallel: ParallelConfig, world_size: int, memory: Mapping[str, float] | None = None) -> str:
    """Table of the layout; `memory` is bytes on the fullest rank by purpose, or None."""
    data = world_size // (parallel.tensor * parallel.pipeline)
    rows = [
        ["ranks", str(world_size)],
        ["tensor parallel", str(parallel.tensor)],
        ["pipeline parallel", str(parallel.pipeline)],
        ["virtual stages", str(parallel.virtual_pipeline)],
        ["data parallel", str(data)],
        ["sequence parallel", "yes" if parallel.sequence else "no"],
        ["distributed optimizer", "yes" if parallel.distributed_optimizer else "no"],
        ["recomputation", parallel.recompute],
    ]
    if memory:
        rows += [[f"memory per rank, {name}", f"{size / 2**30:.2f} GiB"] for name, size in memory.items()]
        rows += [["memory per rank, all", f"{sum(memory.values()) / 2**30:.2f} GiB"]]
    return table("Layout", ["", ""], rows)


def checkpoint_table(folder: str, checkpoint: CheckpointConfig, phases: Mapping[str, BatchConfig]) -> str:
    """Table of checkpoints: interval, number written, number kept."""
    rows = []
    for name, batch in phases.items():
        written = math.ceil(batch.steps / checkpoint.interval)
        rows.append([name, f"{checkpoint.interval:,}", f"{written:,}", f"{min(written, checkpoint.keep):,}"])
    return table(f"Checkpoints in {folder}", ["", "steps apart", "written", "kept"], rows)


def epochs_table(epochs: Mapping[str, Mapping[str, float]], max_epochs: float) -> str:
    """Table of the epochs of each domain at the planned weights, too many marked `!`."""
    domains = list(dict.fromkeys(domain for planned in epochs.values() for domain in planned))
    rows = []
    for domain in domains:
        cells = [planned.get(domain) for planned in epochs.values()]
        total = sum(cell for cell in cells if cell is not None)
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        rows.append([domain, *shown, f"{total:.2f}" + (" !" if total > max_epochs else "  ")])
    title = f"Epochs at the initial weights (! more than {max_epochs:g})"
    return table(title, ["domain", *epochs, "all  "], rows)
