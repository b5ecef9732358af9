"""Ranks and their groups: who computes which slice of the model and which part of a batch.

Key property: nothing outside this room asks megatron-core for a group; a `Layout` answers. Read next: `parallel.py`.
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
from megashear.engine.device import backend, keep_freed_memory, present_cpu, rank_device, uses_cuda
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
        """This rank embeds tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank computes the loss (in its last model chunk)."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes logs."""
        return self.rank == 0


@contextmanager
def distributed(parallel: ParallelConfig, timeout_minutes: float = 30.0) -> Iterator[Layout]:
    """Start this process's ranks and groups, give the layout, and take them down.

    Runs under torchrun, or alone as a world of one. Raises ConfigError where the world does not fit the layout,
    PeerError where what is done with the layout fails because of another rank.
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
        if not _peer_is_gone(error):
            raise
        raise PeerError(
            f"another rank has ended, or has not answered for {timeout_minutes:g} minutes ({_reason(error)}); what it "
            "printed says why, and the launcher names the rank that failed first; the same command again goes on from "
            "the run's last checkpoint"
        ) from error
    finally:
        end_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


def _peer_is_gone(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank; gloo raises a bare RuntimeError, of its own source file."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _reason(error: RuntimeError) -> str:
    """The first sentence, which names the peer, without the place in the library's sources."""
    return re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].split(". ")[0]


def _start(timeout_minutes: float) -> None:
    """Join torchrun's process group, or make one of a single rank."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch.distributed does not list it
        dist.init_process_group(backend(), rank=0, world_size=1, store=store, timeout=timeout)


def build_layout(parallel: ParallelConfig) -> Layout:
    """Make megatron-core's groups for a layout (torch.distributed is already up). Raises ConfigError."""
    world = dist.get_world_size()
    model = parallel.tensor * parallel.pipeline
    if world % model:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} = {model} does not divide the "
            f"{world} launched ranks; launch a multiple of {model} ranks (torchrun --nproc-per-node), or change the "
            "layout"
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
    """End a layout's groups, the world's excepted. megatron-core only forgets them; each keeps threads that poll."""
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # stands for the world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def stage_layers(num_layers: int, layout: Layout, chunk: int) -> range:
    """The global layers of one model chunk of this rank; layers need not divide by the number of chunks.

    Chunk c of stage p is the (c * stages + p)-th part of the stack (interleaved 1F1B); earlier parts take the
    remainder.
    """
    parts = layout.pipeline_size * layout.virtual_size
    part = chunk * layout.pipeline_size + layout.pipeline_rank
    base, extra = divmod(num_layers, parts)
    start = part * base + min(part, extra)
    return range(start, start + base + (1 if part < extra else 0))
