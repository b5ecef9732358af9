"""The export stage of a run: the finished model as a Hugging Face folder. Rank 0 works, the others wait."""

from pathlib import Path

from megashear.config.resolve import known_stages
from megashear.engine.collectives import on_main
from megashear.hf.export_model import export_model
from megashear.phases.run_folder import Context


def run_export(context: Context) -> None:
    """Write the Hugging Face folder of the run's last model: `final`, or `pruned` where no stage trained after it."""
    settings = context.config.export
    output = Path(settings.folder) if settings.folder is not None else context.folder / "export"
    dtype = settings.dtype or context.config.precision

    model = last_model(context)
    on_main(context.layout, lambda: export_model(context.model_folder(model), output, dtype, settings.max_shard_gb))
    context.finish("export", {"name": "export", "folder": str(output), "model": model})


def last_model(context: Context) -> str:
    """The model that the run comes to by the stages that it names or has done; the same on every rank."""
    stages = on_main(context.layout, lambda: known_stages(context.folder, context.config.run.stages))
    return "final" if "pretrain" in stages else "pruned"


def outdated(context: Context) -> bool:
    """Whether the export holds another model than the run's last one; the same on every rank."""
    record, model = context.done("export"), last_model(context)
    return record is not None and record["model"] != model
