"""What the ops do to memory: nothing but their results and a table of sums is allocated, nothing is copied on the way.

So the bytes that an op moves are its inputs, read once by each pass that needs them, and what it writes: the floor.
Rows may lie further apart than 2^31 elements.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megashear import ops
from megashear.ops.kernels.library import launching

from .agreement import DTYPES
from .norm_bounds import EPS

SEQUENCE, BATCH, WIDTH = 96, 2, 256
TOKENS = SEQUENCE * BATCH
# torch operators that move no element; `to` copies by way of `_to_copy`, `contiguous` and `reshape` by way of `clone`
HARMLESS = {"empty", "new_empty", "empty_strided", "empty_like", "ones_like", "detach", "alias", "to", "contiguous"}
HARMLESS |= {"view", "permute", "flatten", "unflatten", "reshape", "_reshape_alias", "as_strided"}


class Floor(NamedTuple):
    """An op on leaves, and what forward and backward write: [tokens, WIDTH] matrices, fp32 [WIDTH] and [tokens]."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    matrices: int
    vectors: int
    columns: int


def _floor(name: str, dtype: torch.dtype) -> Floor:
    with launching(torch.empty(0)) as (library, _):
        strips = library.strip_count(TOKENS)

    def matrix(widths: int) -> Tensor:
        return torch.randn(SEQUENCE, BATCH, widths * WIDTH).to(dtype).requires_grad_()

    def vectors(count: int) -> list[Tensor]:
        return [torch.rand(WIDTH, requires_grad=True) for _ in range(count)]

    if name == "swiglu":  # out; both halves' gradient; the mask's
        return Floor(ops.swiglu, [matrix(2), *vectors(1)], 1 + 2, strips + 1, 0)
    if name == "rms_norm":  # out, 1 / rms; dx, weight's and mask's
        return Floor(lambda x, w, m: ops.rms_norm(x, w, EPS, m), [matrix(1), *vectors(2)], 1 + 1, strips + 2, 1)
    if name == "add_rms_norm":  # sum, out, 1 / rms; dx, dbranch, three vectors'
        leaves = [matrix(1), matrix(1), *vectors(3)]
        return Floor(lambda x, b, f, w, m: ops.add_rms_norm(x, b, f, w, EPS, m), leaves, 2 + 2, 2 * strips + 3, 1)
    tables = ops.rope_tables(32, SEQUENCE, 10000.0)  # q, k, v; the product's gradient
    return Floor(lambda qkv: ops.rope_qkv(qkv, 8, 2, 32, *tables), [matrix(4)], 4 + 4, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["swiglu", "rms_norm", "add_rms_norm", "rope_qkv"])
def test_allocates_results_and_sums_and_copies_nothing(name, dtype):
    floor = _floor(name, dtype)
    outputs = floor.op(*floor.leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(out) for out in outputs]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        torch.autograd.grad(floor.op(*floor.leaves), floor.leaves, upstream)
    names = {event.name.removeprefix("aten::") for event in trace.events() if event.name.startswith("aten::")}
    assert names <= HARMLESS
    changes = [event.nbytes() for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    written = floor.matrices * TOKENS * WIDTH * dtype.itemsize + 4 * (floor.vectors * WIDTH + floor.columns * TOKENS)
    assert sum(change for change in changes if change > 0) == written


def _far_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    """A bf16 matrix whose rows are more than 2^31 elements apart; untouched memory in between takes no room."""
    stride = 2**31 + 64
    room = torch.empty((rows - 1) * stride + width, dtype=torch.bfloat16)
    far = room.as_strided((rows, width), (stride, 1))
    return far.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def test_row_offsets_exceed_32_bits():
    weight = torch.rand(16)
    for op in (ops.swiglu, lambda x: ops.rms_norm(x, weight, EPS)):
        far = _far_rows(2, 16)
        assert torch.equal(op(far), op(far.clone()))
    qkv, tables = _far_rows(2, 32), ops.rope_tables(8, 2, 10000.0)
    turned = ops.rope_qkv(qkv.unsqueeze(1), 1, 2, 8, *tables)
    assert all(map(torch.equal, turned, ops.rope_qkv(qkv.clone().unsqueeze(1), 1, 2, 8, *tables)))
