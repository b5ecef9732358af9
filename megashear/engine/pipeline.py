"""Model chunks under megatron-core's schedules: one forward and backward pass over all micro-batches of a step.

No pipeline, 1F1B, or interleaved 1F1B, as the layout says; the caller gives what a chunk computes and what its loss is.
Read next: `optimizer.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from megashear.engine.layout import Layout, stage_layers

# One micro-batch on one chunk: takes the batch and the chunk, gives the output and a function from output to
# (loss, anything to collect).
ForwardStep = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, Any]]]]
ChunkBuilder = Callable[[range, bool, bool, int | None], MegatronModule]


def build_chunks(num_layers: int, layout: Layout, build: ChunkBuilder) -> list[MegatronModule]:
    """This rank's model chunks; `build(layers, pre_process, post_process, vp_stage)` makes one."""
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
    """Run a step's micro-batches through the pipeline; gradients are reduced at the end unless `forward_only`.

    batches: this rank's micro-batches in order; every chunk sees all of them. Returns what the loss function
    collected, on the ranks of the last stage, and an empty list elsewhere. The loss is averaged over micro-batches
    and data- parallel ranks.
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
    """Send a tensor to the rank of the next stage (after the last one, the first), which calls `from_previous_stage`.

    For what no schedule runs; returns when the tensor may be changed.
    """
    dist.send(tensor.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())


def from_previous_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with what the rank of the stage before sends by `to_next_stage`."""
    dist.recv(tensor, parallel_state.get_pipeline_model_parallel_prev_rank())
    return tensor
