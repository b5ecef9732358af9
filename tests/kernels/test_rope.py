"""Kernels of RoPE and the split of the QKV product against the float64 reference: values, gradients, any size."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.library import dtype_code, launching
from megashear.ops.kernels.rope import rope_qkv, rope_qkv_backward

from .agreement import DTYPES, GUARD, SMALL, UNIT, assert_filled, assert_repeats, assert_within, leaf, poisoned, wide


def _case(positions: int, batch: int, groups: int, queries: int, half: int, dtype, device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rows = groups * (queries + 2) * 2 * half
    qkv = (3 * torch.randn(positions, batch, rows, generator=generator)).to(dtype).to(device)
    tables = ops.rope_tables(2 * half, positions + 2, 10000.0, device=device)  # longer than the sequence
    return qkv, (groups, queries, 2 * half), tables


def _upstream(outputs: tuple[torch.Tensor, ...], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device) for out in outputs]


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    """|first| + |second| of each pair, beside both: what the two products of a turned element cannot exceed."""
    first, second = x.double().abs().chunk(2, dim=-1)
    return torch.cat((first + second,) * 2, dim=-1)


def _check(qkv: torch.Tensor, sizes: tuple[int, int, int], tables: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours, exact = leaf(qkv), wide(qkv)
    outputs = ops.rope_qkv(ours, *sizes, *tables)
    expected = reference.rope_qkv(exact, *sizes, *tables)
    upstream = _upstream(outputs)
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(expected, [d.double() for d in upstream])
    unit, single = UNIT[qkv.dtype], UNIT[torch.float32]
    plain = reference.rope_qkv(qkv.double(), *sizes, torch.ones_like(tables[0]), torch.zeros_like(tables[1]))
    for out, true, before in zip(outputs[:2], expected[:2], plain[:2], strict=True):
        assert_within(out, true, unit * true.abs() + 4 * single * _magnitude(before) + SMALL[qkv.dtype])
    assert torch.equal(outputs[2].double(), expected[2])
    heads = exact.grad.unflatten(2, (sizes[0], sizes[1] + 2, sizes[2]))
    bound = unit * heads.abs() + 4 * single * _magnitude(heads) * 2**0.5  # a pair's magnitude outlives its turn by this
    assert_within(ours.grad, exact.grad, bound.flatten(2) + SMALL[qkv.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "batch", "groups", "queries", "half"),
    [(65, 2, 8, 1, 32), (40, 1, 3, 2, 64), (300, 2, 1, 5, 5)],
)
def test_agrees_with_float64(positions, batch, groups, queries, half, dtype, device):
    _check(*_case(positions, batch, groups, queries, half, dtype, device))


small = st.integers(1, 6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 20), st.integers(0, 3), small, small, st.integers(1, 40), st.sampled_from(DTYPES))
def test_agrees_at_any_size(device, positions, batch, groups, queries, half, dtype):
    _check(*_case(positions, batch, groups, queries, half, dtype, device))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(3)), st.integers(0, 3), st.integers(0, 9), st.sampled_from(DTYPES))
def test_takes_any_strides(device, order, before, after, dtype):
    """A product and gradients that are cut from larger memory in any order of dimensions."""
    qkv, sizes, tables = _case(5, 3, 2, 2, 8, dtype, device)
    room = torch.full([n + before + after for n in qkv.permute(order).shape], float("nan"), dtype=dtype, device=device)
    cut = room[tuple(slice(before, before + n) for n in qkv.permute(order).shape)]
    cut.copy_(qkv.permute(order))
    strided = cut.permute([order.index(d) for d in range(3)])
    assert torch.equal(strided, qkv)
    expected = ops.rope_qkv(qkv, *sizes, *tables)
    assert all(torch.equal(a, b) for a, b in zip(ops.rope_qkv(strided, *sizes, *tables), expected, strict=True))
    upstream = [d.permute(2, 0, 1, 3) for d in _upstream(expected)]
    crooked = [d.transpose(0, 2).contiguous().transpose(0, 2) for d in upstream]
    skewed = [d.transpose(2, 3).contiguous().transpose(2, 3) for d in upstream]
    straight = rope_qkv_backward(*(d.contiguous() for d in upstream), *tables)
    for gradients in (upstream, crooked, skewed):
        assert torch.equal(rope_qkv_backward(*gradients, *tables), straight)


def test_outputs_have_layout_of_product(device):
    qkv, sizes, tables = _case(5, 3, 2, 2, 8, torch.float32, device)
    for out in ops.rope_qkv(qkv, *sizes, *tables):
        assert out.permute(2, 0, 1, 3).is_contiguous()


def test_a_missing_gradient_counts_as_zeros(device):
    qkv, sizes, tables = _case(5, 3, 2, 2, 8, torch.float32, device)
    ours, exact = leaf(qkv), wide(qkv)
    ops.rope_qkv(ours, *sizes, *tables)[1].sum().backward()  # an expanded gradient, and none for queries and values
    reference.rope_qkv(exact, *sizes, *tables)[1].sum().backward()
    torch.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "batch", "half"), [(3, 1, 3), (40, 2, 16), (129, 3, 24)])
def test_writes_every_element_and_no_other(positions, batch, half, dtype, device):
    groups, queries = 3, 2
    qkv, _, tables = _case(positions, batch, groups, queries, half, dtype, device)
    tokens, width = positions * batch, 2 * half

    def space(heads: int) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        buffer = poisoned(tokens * heads * width, dtype, device)
        return buffer, (buffer.data_ptr(), batch * heads * width, heads * width, width)

    (q, q_rows), (k, k_rows), (v, v_rows) = space(groups * queries), space(groups), space(groups)
    dqkv, dqkv_rows = space(groups * (queries + 2))
    rows = (qkv.data_ptr(), qkv.stride(0), qkv.stride(1), width)
    with launching(qkv) as (library, executor):
        addresses = tuple(table.data_ptr() for table in tables)
        end = ((positions, batch, groups, queries, half), dtype_code(qkv), executor)
        library.rope_qkv_forward(rows, *addresses, q_rows, k_rows, v_rows, *end)
        library.rope_qkv_backward(q_rows, k_rows, v_rows, *addresses, dqkv_rows, *end)
    assert_filled(q, k, v, dqkv)
    # turned there and back: the product itself, after two roundings
    back = dqkv[:-GUARD].view_as(qkv).double()
    heads = qkv.unflatten(2, (-1, width))
    assert ((back - qkv.double()).abs() <= (4 * UNIT[dtype] * _magnitude(heads)).flatten(2)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    qkv, sizes, tables = _case(70, 2, 3, 2, 16, dtype, device)

    def run():
        x = leaf(qkv)
        outputs = ops.rope_qkv(x, *sizes, *tables)
        torch.autograd.backward(outputs, _upstream(outputs))
        return *outputs, x.grad

    assert_repeats(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_proper_torch_op(dtype, device):
    qkv, (groups, queries, _), tables = _case(3, 2, 2, 2, 4, dtype, device)
    opcheck(rope_qkv, (leaf(qkv), groups, queries, *tables))


def test_compiles_into_one_graph(device):
    qkv, sizes, tables = _case(3, 2, 2, 2, 4, torch.float32, device)
    x, y = leaf(qkv), leaf(qkv)
    compiled = torch.compile(ops.rope_qkv, backend="aot_eager", fullgraph=True)(x, *sizes, *tables)
    eager = ops.rope_qkv(y, *sizes, *tables)
    for outputs in (compiled, eager):
        torch.autograd.backward(outputs, _upstream(outputs))
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True)) and torch.equal(x.grad, y.grad)


def test_refuses_shapes_that_do_not_fit(device):
    qkv, (groups, queries, width), (cos, sin) = _case(3, 2, 2, 2, 4, torch.float32, device)
    with pytest.raises(ValueError, match="the QKV product must be"):
        ops.rope_qkv(qkv, groups + 1, queries, width, cos, sin)
    with pytest.raises(ValueError, match="positions"):
        ops.rope_qkv(qkv, groups, queries, width, cos[:2], sin[:2])
    with pytest.raises(ValueError, match="cos must be"):
        ops.rope_qkv(qkv, groups, queries, width + 2, cos, sin)
    with pytest.raises(ValueError, match="cos and sin must be fp32"):
        ops.rope_qkv(qkv, groups, queries, width, cos.double(), sin.double())
