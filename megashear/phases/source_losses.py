"""Held-out losses of a run's source, evaluated once and kept in `source_losses.json`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch.nn import Module

from megashear.engine.collectives import on_main
from megashear.errors import CheckpointError
from megashear.evaluation.heldout import evaluate_heldout
from megashear.evaluation.losses import Losses, from_json, to_json
from megashear.files.atomic import write_json
from megashear.mixture.loader import HeldOut
from megashear.phases.run_folder import Context, read_record

SOURCE_LOSSES = "source_losses.json"
"""On the windows of the run's first phase."""
PRETRAIN_LOSSES = "source_losses_pretrain.json"
"""On those of pre-training, where it follows a pruning phase that takes others (`batch.eval_sequences`)."""


def open_heldout(context: Context, sequences: int) -> HeldOut:
    """The run's held-out windows, `sequences` per domain."""
    data = context.config.data
    return HeldOut(context.dataset, data.sequence_length, sequences, data.separate_documents)


def source_losses(
    context: Context, phase: str, chunks: Sequence[Module], micro_batch: int, checkpoint: Path | None
) -> Losses | None:
    """Held-out losses of the source on the windows of `prune` or `pretrain`; None for a run from scratch.

    They are evaluated once, while the weights are those of the source; if pre-training uses other windows, on both.
    They are the references of `references: source`, the baseline of the divergence watch, and a column of the table.

    Raises:
        CheckpointError: The file is missing, and the source's weights have been trained since.
    """
    known = on_main(context.layout, lambda: _known(context.folder, phase))
    if known is not None or context.source is None:
        return known
    path = context.folder / SOURCE_LOSSES
    if checkpoint is not None or context.done("prune") is not None:
        raise CheckpointError(
            f"{path}: missing, and the source's weights have been trained since it was written; restore it, or choose "
            "another run.folder"
        )
    config, losses = context.config, None
    pruning, pretraining = config.prune.batch.eval_sequences, config.pretrain.batch.eval_sequences
    wanted = {path: pretraining if phase == "pretrain" else pruning}
    if phase == "prune" and pretraining != pruning:  # first, so that the run's own file tells that both are there
        wanted = {context.folder / PRETRAIN_LOSSES: pretraining, **wanted}
    for file, sequences in wanted.items():
        with context.evaluating():
            losses = evaluate_heldout(open_heldout(context, sequences), context.layout, list(chunks), micro_batch)
        on_main(context.layout, partial(write_json, file, to_json(losses)))
    return losses


def _known(folder: Path, phase: str) -> Losses | None:
    own = read_losses(folder / PRETRAIN_LOSSES) if phase == "pretrain" else None
    return read_losses(folder / SOURCE_LOSSES) if own is None else own


def read_losses(path: Path) -> Losses | None:
    """Read losses and errors by domain from a JSON file; None if it does not exist."""
    found = read_record(path)
    return None if found is None else from_json(found)
