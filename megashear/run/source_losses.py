"""Held-out losses of a run's source: evaluated once, kept in `source_losses.json`. Read next: `training.py`."""

from collections.abc import Sequence
from pathlib import Path

from torch.nn import Module

from megashear.data.loader import HeldOut
from megashear.engine.collectives import on_main
from megashear.errors import CheckpointError
from megashear.files.atomic import write_json
from megashear.run.context import Context, read_record
from megashear.train.evaluate import evaluate
from megashear.train.losses import Losses, from_json, to_json

SOURCE_LOSSES = "source_losses.json"


def open_heldout(context: Context, sequences: int) -> HeldOut:
    """The run's held-out windows, so many of each domain."""
    data = context.config.data
    return HeldOut(context.dataset, data.sequence_length, sequences, data.separate_documents)


def source_losses(
    context: Context, heldout: HeldOut, chunks: Sequence[Module], micro_batch: int, checkpoint: Path | None
) -> Losses | None:
    """Held-out losses of the source model, evaluated once a run, while its weights are what the stage starts from.

    None for a run from scratch. They are the references of `references: source`, and a column of the run's last table.
    """
    path = context.folder / SOURCE_LOSSES
    known = on_main(context.layout, lambda: read_losses(path))
    if known is not None or context.source is None:
        return known
    if checkpoint is not None or context.done("prune") is not None:
        raise CheckpointError(
            f"{path}: missing, and the source's weights have been trained since it was written; restore it, or choose "
            "another run.folder"
        )
    losses = evaluate(heldout, context.layout, list(chunks), micro_batch)
    on_main(context.layout, lambda: write_json(path, to_json(losses)))
    return losses


def read_losses(path: Path) -> Losses | None:
    """Losses and errors by domain from a JSON file, or None where there is none."""
    found = read_record(path)
    return None if found is None else from_json(found)
