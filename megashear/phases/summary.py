"""Write a finished run's results: final table, `summary.json`, plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megashear.config.resolve import DONE
from megashear.config.schema import PHASES
from megashear.engine.collectives import on_main
from megashear.errors import MegashearError
from megashear.evaluation.losses import Losses, from_json, loss_table
from megashear.files.atomic import write_json
from megashear.phases.run_folder import Context, read_record
from megashear.phases.source_losses import SOURCE_LOSSES, read_losses
from megashear.phases.training import loss_record
from megashear.planning.text_table import duration, table

COLUMNS = {"finalize": "pruned", "pretrain": "final"}
TRAINING = ("prune", "pretrain")


def conclude(context: Context) -> None:
    """Print the table of held-out losses, write `summary.json`, draw plots (on rank 0; the others wait)."""
    on_main(context.layout, lambda: _conclude(context))


def _conclude(context: Context) -> None:
    records = read_records(context)
    losses = read_columns(context, records)
    shapes = {"source": context.source_shape, "final": context.target_shape or context.source_shape}
    parameters = {name: shape.parameters() for name, shape in shapes.items()}
    tokens = {name: records[name]["tokens"] for name in TRAINING if name in records}
    seconds = {name: records[name]["seconds"] for name in TRAINING if name in records}
    evaluation = {name: records[name]["evaluation_seconds"] for name in seconds}
    export = records.get("export", {}).get("folder")
    write_json(
        context.folder / "summary.json",
        {
            "losses": {name: loss_record(column)["losses"] for name, column in losses.items()},
            "errors": {name: loss_record(column)["errors"] for name, column in losses.items()},
            "parameters": parameters,
            "tokens": tokens,
            "seconds": seconds,
            "evaluation_seconds": evaluation,
            "export": export,
        },
    )
    if losses:
        print(loss_table(losses))
    print(outcome_table(parameters, tokens, seconds, evaluation))
    try:
        pictures = draw_pictures(context.folder)
        print(f"pictures: {pictures[0].parent}" if pictures else "pictures: none")
    except MegashearError as error:
        print(f"pictures: none ({error})")
    if export:
        print(f"export: {export}")


def draw_pictures(folder: Path) -> list[Path]:
    """Draw the plots of a run folder. matplotlib is imported here, not at the start of a rank."""
    from megashear.plots.run_plots import plot_run

    return plot_run(folder)


def read_records(context: Context) -> dict[str, dict[str, Any]]:
    """Records of all finished phases, configured or not."""
    found = {}
    for phase in PHASES:
        record = read_record(context.folder / phase / DONE)
        if record is not None:
            found[phase] = record
    return found


def read_columns(context: Context, records: dict[str, dict[str, Any]]) -> dict[str, Losses]:
    """Held-out losses by model: source, pruned, final."""
    columns: dict[str, Losses] = {}
    source = read_losses(context.folder / SOURCE_LOSSES)
    if source is not None:
        columns["source"] = source
    for phase, column in COLUMNS.items():
        if phase in records:
            record = records[phase]
            columns[column] = from_json({d: (record["losses"][d], record["errors"][d]) for d in record["losses"]})
    return columns


def outcome_table(
    parameters: Mapping[str, int],
    tokens: Mapping[str, int],
    seconds: Mapping[str, float],
    evaluation: Mapping[str, float],
) -> str:
    """Table of model parameters, tokens and wall time by phase, and the share of held-out evaluation.

    Args:
        parameters: Parameters by model.
        tokens, seconds: Tokens and wall time by phase.
        evaluation: Seconds of held-out evaluation by phase, part of `seconds`.
    """
    rows = [[f"parameters, {name}", f"{number:,}"] for name, number in parameters.items()]
    rows += [[f"tokens, {phase}", f"{number:,}"] for phase, number in tokens.items()]
    rows += [[f"time (h:mm), {phase}", duration(value)] for phase, value in seconds.items()]
    if len(seconds) > 1:
        rows.append(["time (h:mm), all", duration(sum(seconds.values()))])
    shares = {phase: evaluation[phase] / value for phase, value in seconds.items() if phase in evaluation and value > 0}
    rows += [[f"of it held-out evaluation, {phase}", f"{share:.1%}"] for phase, share in shares.items()]
    return table("Run", ["", ""], rows)
