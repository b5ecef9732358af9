"""Collectives over all ranks, and over one model replica, for what is replicated: flat gradients, flags, small
objects.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megashear.engine.layout import Layout
from megashear.errors import MegashearError

T = TypeVar("T")


def sum_over_world(flat: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over every rank, in place; all ranks hold the same bits afterwards."""
    if dist.get_world_size() > 1:
        dist.all_reduce(flat)
    return flat


def max_over_world(flat: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over every rank, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return flat


def sum_over_data(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the data-parallel ranks, in place; all of them hold the same bits afterwards."""
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def barrier() -> None:
    """Wait for every rank."""
    if dist.get_world_size() > 1:
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Give every rank the source rank's object (trusted: it comes from our own ranks)."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's object, on every rank, in the order of ranks."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(part: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensor-parallel ranks' parts along dimension 0, on every rank of the group."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def on_main(layout: Layout, function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone and give its value to every rank; a user's error is raised on every rank."""
    outcome: tuple[Any, MegashearError | None] = (None, None)
    if layout.is_main:
        try:
            outcome = (function(), None)
        except MegashearError as error:
            outcome = (None, error)
    value: T
    value, failure = broadcast_object(outcome)
    if failure is not None:
        raise failure
    return value
