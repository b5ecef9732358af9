"""Gather live weights and add their gradients, as custom ops over csrc/live_weight."""

import torch
from torch import Tensor

from megashear.ops.kernels.library import address, dtype_code, launching


@torch.library.custom_op("megashear::live_gather", mutates_args=())
def live_gather(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return weight[rows][:, columns]. weight: [R, C] of 2 or 4 bytes per element; indices: int64, ascending."""
    counts = _check(weight, rows, columns)
    live = weight.new_empty(counts)
    with launching(weight) as (library, executor):
        library.live_weight_gather(
            address(weight),
            address(rows),
            address(columns),
            address(live),
            *counts,
            weight.shape[1],
            weight.element_size(),
            executor,
        )
    return live


@live_gather.register_fake
def _(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return weight.new_empty(_check(weight, rows, columns))


@torch.library.custom_op("megashear::live_add", mutates_args=("total",))
def live_add(total: Tensor, rows: Tensor | None, columns: Tensor | None, dlive: Tensor) -> None:
    """Compute total[rows][:, columns] += dlive in place. total: fp32 [R, C]; dlive: [rows, columns]."""
    counts = _check(total, rows, columns)
    if total.dtype != torch.float32 or dlive.shape != counts:
        raise ValueError(f"dlive must be {list(counts)} and total fp32, not {list(dlive.shape)}, {total.dtype}")
    dlive = dlive.contiguous()
    with launching(total) as (library, executor):
        library.live_weight_add(
            address(dlive),
            address(rows),
            address(columns),
            address(total),
            *counts,
            total.shape[1],
            dtype_code(dlive),
            executor,
        )


@live_add.register_fake
def _(total: Tensor, rows: Tensor | None, columns: Tensor | None, dlive: Tensor) -> None:
    _check(total, rows, columns)


def _check(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[int, int]:
    """Return the numbers of live rows and columns; raise ValueError if the matrix or an index does not fit."""
    if matrix.dim() != 2 or not matrix.is_contiguous():
        raise ValueError(f"the weight must be a contiguous matrix, not {list(matrix.shape)}")
    for index in (rows, columns):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64 or index.device != matrix.device):
            raise ValueError(f"an index must be int64 [n] on {matrix.device}, not {index.dtype} {list(index.shape)}")
    return (
        matrix.shape[0] if rows is None else rows.shape[0],
        matrix.shape[1] if columns is None else columns.shape[0],
    )
