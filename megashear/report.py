"""What `megashear check` prints: shapes, layout, memory of every pipeline stage, tokens wanted and there, disk space.

Key properties: text made of a `Report`, without torch. Read next: `config/check.py`, `train/tables.py`.
"""

from megashear.config.calibration import calibration_cost
from megashear.config.check import Report
from megashear.config.dataset import planned_weights, stage_tokens
from megashear.config.memory import Memory
from megashear.config.presets import PRESETS
from megashear.config.schema import Config
from megashear.config.stages import peak_learning_rate, prunes, refit_batches, training_stages
from megashear.config.teaching import teacher_flops_per_token, teaching
from megashear.config.training_schema import BatchConfig
from megashear.masks.target import in_principal_basis
from megashear.train import tables

STATE_BYTES = {"bf16": 14, "fp32": 12}
"""Bytes of a checkpoint per parameter at most: weights, fp32 masters where they differ, Adam's two moments."""
STORED_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a model folder per parameter."""
FOLDED_BYTES = 4
"""The same of the model that finalisation cuts."""


def render(config: Config, report: Report) -> str:
    """The tables of everything that a check could see, and what it could not."""
    stages = {name: stage.batch for name, stage in training_stages(config).items()}
    parts = []
    if report.source is not None:
        parts.append(tables.shape_table(report.source, report.target))
    if stages:
        parts.append(tables.stage_table(stages, learning_rates(config, report), config.data.sequence_length))
    if teachers := teacher_rows(config, report):
        header = ["", "share of the loss", "temperature", "until", "FLOPs/token", "of the teacher", "as a share"]
        parts.append(
            tables.table("Teachers (FLOPs of training a token, and of the teacher's forward)", header, teachers)
        )
    if rows := calibration_rows(config, report):
        parts.append(tables.table("Calibration before pruning", ["", ""], rows))
    if report.world_size is not None:
        parts.append(tables.layout_table(config.parallel, report.world_size))
    if report.memory:
        parts.append(memory_table(report.memory))
    if report.dataset is not None and stages:
        parts.append(tables.epochs_table(_epochs(config, report, stages), config.data.max_epochs))
    if stages:
        parts.append(tables.checkpoint_table(config.run.folder, config.checkpoint, stages))
    if stages and report.source is not None:
        parts.append(disk_table(config, report))
    notes = [f"warning: {text}" for text in report.warnings] + [f"not checked: {text}" for text in report.not_checked]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def learning_rates(config: Config, report: Report) -> dict[str, float]:
    """Peak learning rate of each training stage, where the shapes are known that the derived ones follow."""
    made = report.target if report.target is not None else report.source
    if made is None:
        return {}
    stages = training_stages(config).items()
    return {name: peak_learning_rate(stage.optimizer, made.hidden_size) for name, stage in stages}


def memory_table(memory: dict[str, list[Memory]]) -> str:
    """Estimated GiB on a rank of each pipeline stage, by training stage."""
    header = ["stage", "parameters", "weights", "gradients", "optimizer", "activations", "logits", "teacher", "all"]
    rows = []
    for name, ranks in memory.items():
        for index, rank in enumerate(ranks):
            parts = (rank.weights, rank.gradients, rank.optimizer, rank.activations, rank.logits, rank.teacher)
            label = name if len(ranks) == 1 else f"{name}, pipeline {index}"
            rows.append(
                [label, tables.count(rank.parameters), *(f"{size / 2**30:.2f}" for size in (*parts, rank.total))]
            )
    return tables.table("Memory per rank, estimated (GiB, without CUDA's and NCCL's own)", header, rows)


def teacher_rows(config: Config, report: Report) -> list[list[str]]:
    """What the source as teacher costs each stage that has it as one; nothing where shapes are not known."""
    rows, taught = [], teaching(config, report.source, report.target)
    for name in training_stages(config):
        how = taught[name]
        if not how.weight or report.source is None:
            continue
        student = report.target if name == "pretrain" and report.target is not None else report.source
        length = config.data.sequence_length
        own, extra = student.flops_per_token(length), teacher_flops_per_token(report.source, length)
        shares = [f"{how.weight:g}", f"{how.temperature:g}", how.until]
        rows.append([name, *shares, tables.count(own), tables.count(extra), f"{extra / own:.0%}"])
    return rows


def calibration_rows(config: Config, report: Report) -> list[list[str]]:
    """What basis, scores and fit will cost; nothing where shapes are not known or nothing is calibrated."""
    if "prune" not in config.run.stages or report.source is None or report.target is None:
        return []
    length, source, target = config.data.sequence_length, report.source, report.target
    directions = in_principal_basis(config.prune, source, target)
    cost = calibration_cost(config.prune, source, target, length, directions, config.precision)
    if not cost.tokens:
        return []
    trained = sum(
        stage_tokens(stage.batch, length) * (source if name == "prune" else target).flops_per_token(length)
        for name, stage in training_stages(config).items()
    )
    rows = [["tokens", tables.count(cost.tokens)], ["FLOPs", f"{cost.flops:.2e}"]]
    if trained:
        rows.append(["as a share of the training's", f"{cost.flops / trained:.1%}"])
    if cost.host_bytes:
        whole = cost.host_bytes * config.parallel.tensor / 2**30
        rows.append(["host memory, over tensor- and data-parallel ranks", f"{whole:.2f} GiB"])
    return rows


def disk_table(config: Config, report: Report) -> str:
    """GiB of one checkpoint of each stage, of those kept with the one that is being written, and of model folders."""
    rows = []
    for name in training_stages(config):
        shape = report.target if name == "pretrain" and report.target is not None else report.source
        assert shape is not None
        size = STATE_BYTES[config.precision] * shape.parameters() / 2**30
        rows.append([name, f"{size:.1f}", f"{size * (config.checkpoint.keep + 1):.1f}"])
    rows.append(["models", "", f"{_model_bytes(config, report) / 2**30:.1f}"])
    return tables.table("Disk space (GiB, at most)", ["", "a checkpoint", "at the peak"], rows)


def _model_bytes(config: Config, report: Report) -> float:
    """Bytes of a run's model folders while most of them are there: at the cut, where the run prunes."""
    assert report.source is not None
    size = STORED_BYTES[config.precision]
    if not prunes(config) or report.target is None:
        return size * report.source.parameters()
    rotated = in_principal_basis(config.prune, report.source, report.target)
    learned = config.prune.method == "learned"  # the masked model and two moments; both are cut with it
    copies = 3 if learned else int(refit_batches(config.prune) > 0)  # else the fitted source
    source = size * (rotated + copies) * report.source.parameters()
    return source + (FOLDED_BYTES + (2 * size if learned else 0)) * report.target.parameters()


def presets_table() -> str:
    """Every shape that a preset names."""
    header = ["preset", "hidden", "layers", "heads", "groups", "head size", "intermediate", "vocabulary", "parameters"]
    rows = []
    for name, shape in PRESETS.items():
        sizes = [shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_query_groups, shape.head_dim]
        sizes += [shape.intermediate_size, shape.vocab_size]
        rows.append([name, *(str(size) for size in sizes), tables.count(shape.parameters())])
    return tables.table("Shapes", header, rows)


def _epochs(config: Config, report: Report, stages: dict[str, BatchConfig]) -> dict[str, dict[str, float]]:
    assert report.dataset is not None
    weights = planned_weights(config, report.dataset)
    there = {name: max(domain.train_tokens, 1) for name, domain in report.dataset.domains.items()}
    return {
        stage: {
            name: weight * stage_tokens(batch, config.data.sequence_length) / there[name]
            for name, weight in weights.items()
        }
        for stage, batch in stages.items()
    }
