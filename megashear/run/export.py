"""The export stage of a run: the finished model as a Hugging Face folder. Rank 0 works, the others wait."""

from pathlib import Path

from megashear.engine.collectives import on_main
from megashear.export.folder import export_model
from megashear.run.context import Context


def run_export(context: Context) -> None:
    """Write the Hugging Face folder of the run's last model: `final`, or `pruned` where no stage trained after it."""
    settings = context.config.export
    output = Path(settings.folder) if settings.folder is not None else context.folder / "export"
    final = context.model_folder("final")
    model = final if "pretrain" in context.config.run.stages else context.model_folder("pruned")
    dtype = settings.dtype or context.config.precision
    on_main(context.layout, lambda: export_model(model, output, dtype, settings.max_shard_gb))
    context.finish("export", {"name": "export", "folder": str(output)})
