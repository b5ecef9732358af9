"""Live weights: the kernel's copies and sums are the reference's to the bit, for any index, dtype and device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels import live_weight as kernel
from megashear.ops.kernels.library import compiled_for

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
compiled = pytest.mark.skipif(not compiled_for(torch.device("cpu")), reason="the CPU kernels were not built")


def _index(size: int, some: bool, generator: torch.Generator) -> torch.Tensor | None:
    """Ascending indices of about half of `size`, or None for all."""
    return torch.nonzero(torch.rand(size, generator=generator) < 0.5).flatten() if some else None


@compiled
@pytest.mark.parametrize("device", DEVICES)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_kernel_moves_what_the_reference_moves(device, height, width, some_rows, some_columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(height, width, generator=generator).to(device, dtype)
    indices = [_index(height, some_rows, generator), _index(width, some_columns, generator)]
    rows, columns = (None if index is None else index.to(device) for index in indices)
    live = kernel.live_gather(weight, rows, columns)
    assert torch.equal(live, reference.live_gather(weight, rows, columns))
    found = torch.randn(height, width, generator=generator).to(device)
    expected = found.clone()
    kernel.live_add(found, rows, columns, live)
    reference.live_add(expected, rows, columns, live)
    assert torch.equal(found, expected)


@compiled
def test_ops_are_well_formed():
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 5])
    for index in ((rows, columns), (rows, None), (None, columns), (None, None)):
        live = torch.randn(index[0].shape[0] if index[0] is not None else 4, 6 if index[1] is None else 3)
        torch.library.opcheck(torch.ops.megashear.live_gather, (torch.randn(4, 6), *index))
        torch.library.opcheck(torch.ops.megashear.live_add, (torch.randn(4, 6), *index, live))


@compiled
def test_shapes_that_do_not_fit_are_refused():
    weight, index = torch.randn(4, 6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="contiguous matrix"):
        kernel.live_gather(weight.t(), index, None)
    with pytest.raises(ValueError, match="must be int64"):
        kernel.live_gather(weight, index.int(), None)
    with pytest.raises(ValueError, match="dlive must be"):
        kernel.live_add(weight, index, None, torch.randn(3, 6))


def test_float64_uses_reference():
    weight, rows, columns = torch.randn(5, 7, dtype=torch.float64), torch.tensor([1, 4]), torch.tensor([0, 6])
    assert torch.equal(ops.live_gather(weight, rows, columns), weight[rows][:, columns])
    total = torch.zeros(5, 7, dtype=torch.float64)
    ops.live_add(total, rows, columns, torch.ones(2, 2, dtype=torch.float64))
    assert total.sum() == 4 and total[4, 6] == 1
