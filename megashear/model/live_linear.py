"""A tensor-parallel product over live rows and columns of its weight.

The live part is gathered before the product and again before its backward pass, so that no micro-batch in flight keeps
a copy. Its gradient goes straight into the weight's fp32 gradient buffer where there is one. Read next: `live.py`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megashear import ops
from megashear.engine.parallel import parallel_product


class _LiveWeight(torch.autograd.Function):
    """weight[rows][:, columns]; the gradient is added where it belongs."""

    apply: ClassVar[Callable[..., Tensor]]  # untyped in torch

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.weight, ctx.rows, ctx.columns = weight, rows, columns
        return ops.live_gather(weight.detach(), rows, columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        # The buffer of megatron-core's DistributedDataParallel, which adds what autograd brings: here nothing.
        total = getattr(ctx.weight, "main_grad", None)
        if total is not None:
            ops.live_add(total, ctx.rows, ctx.columns, gradient)
            return None, None, None
        total = torch.zeros_like(ctx.weight, memory_format=torch.contiguous_format)
        ops.live_add(total, ctx.rows, ctx.columns, gradient)
        return total, None, None


def live_product(
    linear: nn.Module, x: Tensor, rows: Tensor | None, columns: Tensor | None, weight: Tensor | None = None
) -> Tensor:
    """x times the live part of a column- or row-parallel linear's weight, transposed.

    x: [.., columns]; rows, columns: int64, ascending, None for all; weight: [rows, columns] in place of the linear's
    own. Returns [.., rows], summed over tensor-parallel ranks by a row-parallel linear.
    """
    full = linear.weight if weight is None else weight
    assert isinstance(full, Tensor)
    if rows is None and columns is None:
        return parallel_product(linear, x, full, fused=True)
    live = _LiveWeight.apply(full, rows, columns)
    at, shape = live.data_ptr(), live.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == at and saved.shape == shape else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return ops.live_gather(full.detach(), rows, columns) if kept is None else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return parallel_product(linear, x, live, fused=False)
