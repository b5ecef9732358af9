"""Run model chunks under megatron-core's schedules: no pipeline, 1F1B or interleaved 1F1B."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from megashear.engine.layout import Layout, stage_layers

# Runs one micro-batch on one chunk. Takes the batch and the chunk; returns the output and a function that maps the
# output to (loss, object to collect).
ForwardStep = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, Any]]]]
ChunkBuilder = Callable[[range, bool, bool, int | None], MegatronModule]


def build_chunks(num_layers: int, layout: Layout, build: ChunkBuilder) -> list[MegatronModule]:
    """Build this rank's model chunks.

    Args:
        num_layers: Layers of the whole model.
        layout: Layout of the ranks.
        build: Builds one chunk from `(layers, pre_process, post_process, vp_stage)`.
    """
    chunks = []
    for chunk in range(layout.virtual_size):
        first = layout.is_first_stage and chunk == 0
        last = layout.is_last_stage and chunk == layout.virtual_size - 1
        stage = chunk if layout.virtual_size > 1 else None
        chunks.append(build(stage_layers(num_layers, layout, chunk), first, last, stage))
    return chunks


def run_micro_batches(
    forward_step: ForwardStep,
    chunks: list[torch.nn.Module],
    batches: list[Any],
    sequence_length: int,
    micro_batch: int,
    forward_only: bool = False,
) -> list[Any]:
    """Run all micro-batches of a step through the pipeline and reduce the gradients.

    The loss is averaged over micro-batches and data-parallel ranks.

    Args:
        forward_step: Computes one chunk on one micro-batch.
        chunks: This rank's model chunks.
        batches: This rank's micro-batches in order. Every chunk processes all of them.
        sequence_length: Tokens of a sequence.
        micro_batch: Sequences of a micro-batch.
        forward_only: Skip the backward pass and the reduction.

    Returns:
        The objects collected by the loss function on the ranks of the last stage, an empty list on other ranks.
    """
    iterators: list[Iterator[Any]] = [iter(batches) for _ in chunks]

    def step(iterator: Iterator[Any], chunk: torch.nn.Module, *_: Any) -> Any:
        return forward_step(next(iterator), chunk)

    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
    return collected


def to_next_stage(tensor: torch.Tensor) -> None:
    """Send a tensor to the next stage, which calls `from_previous_stage`. The last stage sends to the first.

    For transfers outside a schedule. The tensor may be modified after the call.
    """
    dist.send(tensor.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())


def from_previous_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Receive into `tensor` from the previous stage, which calls `to_next_stage`, and return it."""
    dist.recv(tensor, parallel_state.get_pipeline_model_parallel_prev_rank())
    return tensor
