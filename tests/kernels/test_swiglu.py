"""Masked SwiGLU kernels against the float64 reference: values, gradients, any size, every element written."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.library import dtype_code, launching, matrix
from megashear.ops.kernels.swiglu import masked_swiglu

from .agreement import DTYPES, SMALL, UNIT, assert_filled, assert_repeats, assert_within, cut_rows, leaf, poisoned, wide


def _case(tokens: int, features: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    gate_up = (3 * torch.randn(tokens, 2 * features, generator=generator)).to(dtype)
    mask = torch.rand(features, generator=generator) * (torch.rand(features, generator=generator) < 0.7)
    dout = torch.randn(tokens, features, generator=generator).to(dtype)
    return gate_up.to(device), mask.to(device), dout.to(device)


def _check(gate_up: torch.Tensor, mask: torch.Tensor | None, dout: torch.Tensor) -> None:
    ours, our_mask = leaf(gate_up), None if mask is None else leaf(mask)
    exact, exact_mask = wide(gate_up), wide(mask)
    out, exact_out = ops.swiglu(ours, our_mask), reference.swiglu(exact, exact_mask)
    out.backward(dout)
    exact_out.backward(dout.double())
    # fp32 arithmetic of about 20 roundings, then one rounding to the dtype; tiny values may underflow
    unit, small = UNIT[gate_up.dtype], SMALL[gate_up.dtype]
    assert_within(out, exact_out, (unit + 20 * UNIT[torch.float32]) * exact_out.abs() + small)
    gate, up = gate_up.double().chunk(2, dim=-1)
    m = 1.0 if mask is None else mask.double()
    sig = torch.sigmoid(gate)
    dproduct = (dout.double() * m).abs()
    terms = torch.cat((dproduct * up.abs() * sig * (1 + gate.abs()), dproduct * (gate * sig).abs()), dim=-1)
    assert_within(ours.grad, exact.grad, unit * exact.grad.abs() + 20 * UNIT[torch.float32] * terms + small)
    if mask is not None:
        columns = (dout.double() * gate * sig * up).abs().sum(0)
        additions = 20 + len(gate)
        assert_within(our_mask.grad, exact_mask.grad, additions * UNIT[torch.float32] * columns + small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("tokens", "features"), [(300, 1376), (4097, 24), (17, 2049)])
def test_agrees_with_float64(tokens, features, masked, dtype, device):
    gate_up, mask, dout = _case(tokens, features, dtype, device)
    _check(gate_up, mask if masked else None, dout)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 70), st.integers(0, 70), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
def test_agrees_at_any_size(device, tokens, features, dtype, masked, seed):
    gate_up, mask, dout = _case(tokens, features, dtype, device, seed)
    _check(gate_up, mask if masked else None, dout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_and_non_finite_gates(dtype, device):
    gate = torch.tensor([-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4, float("inf"), float("nan")]).to(dtype)
    gate_up = torch.cat((gate, torch.ones(9, dtype=dtype)))[None].to(device)
    out = ops.swiglu(gate_up)[0].cpu().double()
    exact = reference.swiglu(gate_up.cpu().double())[0]
    torch.testing.assert_close(out[:7], exact[:7], rtol=2 * UNIT[dtype], atol=SMALL[dtype])
    assert out[7] == float("inf") and out[8].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), [(3, 5), (40, 16), (513, 40)])
def test_writes_every_element_and_no_other(tokens, features, dtype, device):
    gate_up, mask, dout = _case(tokens, features, dtype, device)
    size, vector = tokens * features, (features, torch.float32, device)
    with launching(gate_up) as (library, executor):
        out, dgate_up = poisoned(size, dtype, device), poisoned(2 * size, dtype, device)
        dmask, partial = poisoned(*vector), poisoned(library.strip_count(tokens) * features, torch.float32, device)
        sizes = (tokens, features, dtype_code(gate_up), executor)
        library.masked_swiglu_forward(matrix(gate_up), mask.data_ptr(), out.data_ptr(), *sizes)
        inputs = (matrix(dout), matrix(gate_up), mask.data_ptr())
        library.masked_swiglu_backward(*inputs, dgate_up.data_ptr(), dmask.data_ptr(), partial.data_ptr(), *sizes)
    assert_filled(out, dgate_up, dmask, partial)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    gate_up, mask, dout = _case(700, 96, dtype, device)

    def run():
        x, m = leaf(gate_up), leaf(mask)
        out = ops.swiglu(x, m)
        out.backward(dout)
        return out.detach(), x.grad, m.grad

    assert_repeats(run)


def test_takes_strided_inputs_and_leading_dimensions(device):
    gate_up, mask, _ = _case(24, 6, torch.float32, device)
    strided = gate_up.view(4, 6, 12).transpose(0, 1)
    x = leaf(strided)
    out = ops.swiglu(x, mask)
    torch.testing.assert_close(out, reference.swiglu(strided, mask))
    out.sum().backward()  # an expanded, stride-0 gradient
    exact = leaf(strided)
    reference.swiglu(exact, mask).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad)


def test_mask_of_another_dtype_gets_its_own_gradient(device):
    gate_up, mask, dout = _case(9, 8, torch.bfloat16, device)
    m = leaf(mask.bfloat16())
    ops.swiglu(gate_up, m).backward(dout)
    assert m.grad.dtype == torch.bfloat16 and m.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
def test_is_a_proper_torch_op(dtype, masked, device):
    gate_up, mask, _ = _case(6, 7, dtype, device)
    opcheck(masked_swiglu, (leaf(gate_up.view(2, 3, 14)), leaf(mask) if masked else None))


def test_compiles_into_one_graph(device):
    gate_up, mask, dout = _case(6, 8, torch.float32, device)
    x, m = leaf(gate_up), leaf(mask)
    torch.compile(ops.swiglu, backend="aot_eager", fullgraph=True)(x, m).backward(dout)
    y, n = leaf(gate_up), leaf(mask)
    ops.swiglu(y, n).backward(dout)
    assert torch.equal(x.grad, y.grad) and torch.equal(m.grad, n.grad)


@pytest.mark.parametrize(("shape", "mask"), [((3, 7), None), ((3, 8), 3), ((), None)])
def test_refuses_shapes_that_do_not_fit(shape, mask, device):
    with pytest.raises(ValueError, match="must be"):
        ops.swiglu(torch.zeros(shape, device=device), None if mask is None else torch.ones(mask, device=device))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(DTYPES), st.booleans())
def test_takes_rows_cut_from_wider_ones(device, before, after, dtype, swap):
    gate_up, mask, dout = _case(24, 8, dtype, device)
    results = []
    for form in (lambda y: y.view(4, 6, -1), lambda y: cut_rows(y.view(4, 6, -1), before, after, swap)):
        x, m = form(gate_up).detach().requires_grad_(), leaf(mask)
        out = ops.swiglu(x, m)
        out.backward(form(dout))
        results.append([out, x.grad, m.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
