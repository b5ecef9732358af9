"""The export stage of a run: the finished model as a Hugging Face folder. Rank 0 works, the others wait."""

from pathlib import Path

from megashear.config.stages import known_stages
from megashear.engine.collectives import on_main
from megashear.export.folder import export_model
from megashear.run.context import Context


def run_export(context: Context) -> None:
    """Write the Hugging Face folder of the run's last model: `final`, or `pruned` where no stage trained after it."""
    settings = context.config.export
    output = Path(settings.folder) if settings.folder is not None else context.folder / "export"
    dtype = settings.dtype or context.config.precision

    def export() -> None:
        trained = "pretrain" in known_stages(context.folder, context.config.run.stages)
        model = context.model_folder("final" if trained else "pruned")
        export_model(model, output, dtype, settings.max_shard_gb)

    on_main(context.layout, export)
    context.finish("export", {"name": "export", "folder": str(output)})
