"""Create process groups and describe this rank's position in the parallel layout.

Code outside the engine uses a `Layout` and never asks megatron-core for a process group.
"""

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megashear.config.schema import ParallelConfig
from megashear.engine.device import backend, keep_freed_memory, present_cpu, rank_device
from megashear.engine.startup import uses_cuda
from megashear.errors import ConfigError, PeerError


@dataclass(frozen=True)
class Layout:
    """Sizes and this rank's coordinates in tensor, pipeline and data parallelism."""

    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    virtual_size: int
    data_size: int
    data_rank: int
    sequence: bool
    world_size: int
    rank: int
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss, in its last model chunk."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes logs."""
        return self.rank == 0


@contextmanager
def distributed(parallel: ParallelConfig, timeout_minutes: float = 30.0) -> Iterator[Layout]:
    """Initialize torch.distributed and the groups of a layout, and destroy them on exit.

    Without torchrun, the process is a world of one rank.

    Args:
        parallel: Sizes of tensor, pipeline and data parallelism.
        timeout_minutes: Timeout of a collective.

    Yields:
        The layout of this rank.

    Raises:
        ConfigError: If the number of ranks does not fit the layout.
        PeerError: If a collective fails because of another rank.
    """
    present_cpu()
    keep_freed_memory()
    if uses_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        _start(timeout_minutes)
    try:
        yield build_layout(parallel)
    except RuntimeError as error:
        if not _failed_on_peer(error):
            raise
        raise PeerError(
            f"another rank failed, or did not respond for {timeout_minutes:g} minutes ({_reason(error)}). Read its "
            "output for the cause; the launcher names the rank that failed first. Rerun the same command to resume "
            "from the last checkpoint"
        ) from error
    finally:
        end_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


def _failed_on_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because of another rank. gloo raises a RuntimeError that names its source."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of an error, which names the peer, without the source location."""
    return re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].split(". ")[0]


def _start(timeout_minutes: float) -> None:
    """Join torchrun's process group, or create one of a single rank."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # missing in the stubs of torch.distributed
        dist.init_process_group(backend(), rank=0, world_size=1, store=store, timeout=timeout)


def build_layout(parallel: ParallelConfig) -> Layout:
    """Create megatron-core's process groups for a layout.

    torch.distributed must be initialized. Groups of an earlier layout are destroyed.

    Raises:
        ConfigError: If tensor x pipeline does not divide the number of ranks.
    """
    world = dist.get_world_size()
    model = parallel.tensor * parallel.pipeline
    if world % model:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} = {model} does not divide the "
            f"{world} launched ranks; launch a multiple of {model} ranks (torchrun --nproc-per-node) or change "
            "parallel"
        )
    end_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    return Layout(
        tensor_size=parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        virtual_size=parallel.virtual_pipeline,
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        sequence=parallel.sequence and parallel.tensor > 1,
        world_size=world,
        rank=dist.get_rank(),
        device=rank_device(),
    )


def end_groups() -> None:
    """Destroy the groups of a layout, except the world's. megatron-core drops them, but their threads keep polling."""
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None is the world's group
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def stage_layers(num_layers: int, layout: Layout, chunk: int) -> range:
    """Return the global layer indices of one model chunk of this rank.

    Chunk c of stage p is part c * stages + p of the stack (interleaved 1F1B). The number of layers need not be
    divisible by the number of parts; earlier parts get one layer more.
    """
    parts = layout.pipeline_size * layout.virtual_size
    part = chunk * layout.pipeline_size + layout.pipeline_rank
    base, extra = divmod(num_layers, parts)
    start = part * base + min(part, extra)
    return range(start, start + base + (1 if part < extra else 0))
