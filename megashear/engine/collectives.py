"""Collectives over all ranks and over one model replica, for replicated data such as flat gradients and flags."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megashear.engine.layout import Layout
from megashear.errors import MegashearError

T = TypeVar("T")


def sum_over_world(flat: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, with the same bits on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(flat)
    return flat


def max_over_world(flat: torch.Tensor) -> torch.Tensor:
    """Compute the elementwise maximum over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return flat


def sum_over_data(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the data-parallel ranks, in place, with the same bits on each of them."""
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def barrier() -> None:
    """Wait for every rank."""
    if dist.get_world_size() > 1:
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Broadcast a picklable object from the rank `source` to every rank."""
    if dist.get_world_size() == 1:
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=source)
    return objects[0]


def gather_objects(value: T) -> list[T]:
    """Gather a picklable object from every rank, on every rank, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(part: torch.Tensor) -> torch.Tensor:
    """Concatenate the parts of the tensor-parallel ranks along dimension 0, on every rank of the group."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def on_main(layout: Layout, function: Callable[[], T]) -> T:
    """Call a function on rank 0 only and broadcast its result.

    Args:
        layout: Layout of the ranks.
        function: Called on rank 0. Its result must be picklable.

    Returns:
        The function's result, on every rank.

    Raises:
        MegashearError: On every rank if the function raises it on rank 0.
    """
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
