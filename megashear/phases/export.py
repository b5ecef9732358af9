"""Export phase: write the run's last model as a Hugging Face folder. Rank 0 works, the others wait."""

from pathlib import Path

from megashear.config.resolve import known_phases
from megashear.engine.collectives import on_main
from megashear.hf.export_model import export_model
from megashear.phases.run_folder import Context


def run_export(context: Context) -> None:
    """Write the Hugging Face folder of the run's last model: `final`, or `pruned` if no phase trained after it."""
    settings = context.config.export
    output = Path(settings.folder) if settings.folder is not None else context.folder / "export"
    dtype = settings.dtype or context.config.precision

    model = last_model(context)
    on_main(context.layout, lambda: export_model(context.model_folder(model), output, dtype, settings.max_shard_gb))
    context.finish("export", {"name": "export", "folder": str(output), "model": model})


def last_model(context: Context) -> str:
    """Name of the last model of the phases that are configured or finished; the same on every rank."""
    phases = on_main(context.layout, lambda: known_phases(context.folder, context.config.run.phases))
    return "final" if "pretrain" in phases else "pruned"


def outdated(context: Context) -> bool:
    """Whether the export is of another model than the run's last one; the same on every rank."""
    record, model = context.done("export"), last_model(context)
    return record is not None and record["model"] != model
