"""Plain-text tables that a run prints: what is planned, before the start; what came of it, at the end.

Key properties: pure functions of numbers to strings, no state, no library. The first column is aligned left, the others
right. Read next: `progress.py` (the lines between the two), `config/schema.py` (the sections shown).
"""

import math
from collections.abc import Mapping, Sequence

from megashear.config.schema import CheckpointConfig, ParallelConfig
from megashear.config.shape import ModelShape
from megashear.config.training_schema import BatchConfig
from megashear.train.losses import Losses, mean_of
from megashear.train.progress import duration


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title line, a header (none where all its cells are empty), a rule and the rows, in columns two blanks apart."""
    widths = [max(len(cells[column]) for cells in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    head = [line(header)] if any(header) else []
    return "\n".join([title, *head, "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def count(number: float) -> str:
    """A large number in short, three digits: 6.74 B, 420 M, 1.05 T; below a thousand as it is."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"


def shape_table(source: ModelShape, target: ModelShape | None) -> str:
    """Sizes and parameters now and then, and what remains; target: None where nothing is pruned."""
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


def stage_table(stages: Mapping[str, BatchConfig], rates: Mapping[str, float], sequence_length: int) -> str:
    """Steps, sequences and tokens of each training stage; rates: their peak learning rates, as far as known."""
    rows = []
    for name, batch in stages.items():
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
    return table(f"Stages (sequences of {sequence_length:,} tokens)", header, rows)


def layout_table(parallel: ParallelConfig, world_size: int, memory: Mapping[str, float] | None = None) -> str:
    """How the ranks are laid out; memory: bytes on the fullest rank by what they are for, or None."""
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


def checkpoint_table(folder: str, checkpoint: CheckpointConfig, stages: Mapping[str, BatchConfig]) -> str:
    """Where checkpoints go, how often one is written, how many there will be and how many stay on the disk."""
    rows = []
    for name, batch in stages.items():
        written = math.ceil(batch.steps / checkpoint.interval)
        rows.append([name, f"{checkpoint.interval:,}", f"{written:,}", f"{min(written, checkpoint.keep):,}"])
    return table(f"Checkpoints in {folder}", ["", "steps apart", "written", "kept"], rows)


def epochs_table(epochs: Mapping[str, Mapping[str, float]], max_epochs: float) -> str:
    """Epochs of each domain that the planned weights need, too many marked `!`; epochs: stage -> domain -> epochs."""
    domains = list(dict.fromkeys(domain for planned in epochs.values() for domain in planned))
    rows = []
    for domain in domains:
        cells = [planned.get(domain) for planned in epochs.values()]
        total = sum(cell for cell in cells if cell is not None)
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        rows.append([domain, *shown, f"{total:.2f}" + (" !" if total > max_epochs else "  ")])
    title = f"Epochs at the initial weights (! more than {max_epochs:g})"
    return table(title, ["domain", *epochs, "all  "], rows)


def loss_table(columns: Mapping[str, Losses]) -> str:
    """Held-out loss with its error, and perplexity, per domain (rows) and model (columns: source, pruned, final).

    columns: name -> {domain: (loss in nats per token, its standard error)}. The last row is the mean over domains that
    every column has, with the error of independent domains. A domain that a column lacks is shown as `-`.
    """
    domains = list(dict.fromkeys(domain for losses in columns.values() for domain in losses))
    rows = [
        [domain, *(cell for losses in columns.values() for cell in loss_cells(losses.get(domain)))]
        for domain in domains
    ]
    shared = [domain for domain in domains if all(domain in losses for losses in columns.values())]
    if len(shared) > 1:
        means = [mean_of([losses[domain] for domain in shared]) for losses in columns.values()]
        rows.append([f"mean of {len(shared)}", *(cell for mean in means for cell in loss_cells(mean))])
    header = ["domain", *(text for name in columns for text in (name, "ppl"))]
    return table("Held-out loss (nats per token, +- standard error) and perplexity", header, rows)


def loss_cells(loss: tuple[float, float] | None) -> list[str]:
    """Loss with its standard error, and perplexity; blanks where there is none or it is not finite."""
    if loss is None or not math.isfinite(loss[0]):
        return ["-", "-"]
    perplexity = math.exp(min(loss[0], 700.0))
    return [with_error(*loss), f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"]


def with_error(value: float, error: float, sign: str = "-") -> str:
    """A number and its standard error; alone where no error is known, as of a single sequence. sign: `+` shows both."""
    shown = f"{value:{sign}.4f}"
    return f"{shown} +- {error:.4f}" if math.isfinite(error) else shown


def outcome_table(
    parameters: Mapping[str, int],
    tokens: Mapping[str, int],
    seconds: Mapping[str, float],
    evaluation: Mapping[str, float],
) -> str:
    """Parameters of each model, tokens and wall time of each stage, and the share of held-out evaluation in it.

    evaluation: seconds of `seconds`, by stage.
    """
    rows = [[f"parameters, {name}", f"{number:,}"] for name, number in parameters.items()]
    rows += [[f"tokens, {stage}", f"{number:,}"] for stage, number in tokens.items()]
    rows += [[f"time (h:mm), {stage}", duration(value)] for stage, value in seconds.items()]
    if len(seconds) > 1:
        rows.append(["time (h:mm), all", duration(sum(seconds.values()))])
    shares = {stage: evaluation[stage] / value for stage, value in seconds.items() if stage in evaluation and value > 0}
    rows += [[f"of it held-out evaluation, {stage}", f"{share:.1%}"] for stage, share in shares.items()]
    return table("Run", ["", ""], rows)
