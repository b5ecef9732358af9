"""Select the attention backend of a phase on GPUs, once per run.

Rank 0 measures before the first step, at a point that every rank passes, and the run folder keeps the result by GPU
name. Ranks and resumed runs therefore round alike.
"""

from typing import Any

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.engine.collectives import on_main
from megashear.errors import CheckpointError
from megashear.files.atomic import write_json
from megashear.phases.run_folder import Context, read_record

CHOICES = "attention.json"


def choose_attention_backend(context: Context, shape: ModelShape, sequences: int, masked: bool) -> None:
    """Select the attention backend on every rank, from the run folder or by rank 0's measurement.

    Nothing is measured on CPUs, or with MEGASHEAR_ATTENTION set.

    Args:
        context: The run.
        shape: Shape of the model that is trained.
        sequences: Sequences of a micro-batch.
        masked: Whether heads are masked.

    Raises:
        CheckpointError: The record cannot be read (on every rank).
    """
    data, layout = context.config.data, context.layout
    wanted = ops.AttentionShape(
        layout.device, context.dtype, data.sequence_length, shape.head_dim, data.separate_documents
    )
    heads, groups = (max(1, heads // layout.tensor_size) for heads in (shape.num_heads, shape.num_query_groups))
    path = context.folder / CHOICES

    def choose() -> ops.AttentionChoice | None:
        known = read_record(path) or {}
        if str(wanted) in known:
            return recorded(known[str(wanted)], str(path))
        measured = ops.measure_attention(wanted, ops.AttentionSample(sequences, heads, groups, masked))
        if measured is not None:
            write_json(path, known | {str(wanted): measured._asdict()})
        return measured

    chosen = on_main(layout, choose)
    if chosen is not None:
        ops.choose_attention_backend(wanted, chosen)


def recorded(entry: Any, where: str) -> ops.AttentionChoice:
    """Parse a recorded choice. Raises CheckpointError if it is not one."""
    try:
        return ops.AttentionChoice(str(entry["serves"]), dict(entry["milliseconds"]), dict(entry["distances"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a record of a choice; remove it to measure again") from error
