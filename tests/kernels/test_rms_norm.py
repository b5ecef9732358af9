"""Masked RMSNorm kernels against the float64 reference: values, gradients, any size, every element written."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.library import dtype_code, launching
from megashear.ops.kernels.rms_norm import masked_rms_norm

from .agreement import UNIT, assert_within, leaf, wide

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def _case(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(tokens, hidden, generator=generator)).to(dtype)
    weight = torch.randn(hidden, generator=generator)
    mask = torch.rand(hidden, generator=generator) * (torch.rand(hidden, generator=generator) < 0.7)
    dout = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return x.to(device), weight.to(device), mask.to(device), dout.to(device)


def _check(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None, dout: torch.Tensor) -> None:
    ours = [leaf(x), leaf(weight), None if mask is None else leaf(mask)]
    exact = [wide(x), wide(weight), wide(mask)]
    out = ops.rms_norm(ours[0], ours[1], EPS, ours[2])
    exact_out = reference.rms_norm(exact[0], exact[1], EPS, exact[2])
    out.backward(dout)
    exact_out.backward(dout.double())
    tokens, hidden = x.shape
    unit, single, small = UNIT[x.dtype], UNIT[torch.float32], 1e-30
    # fp32 sum of `hidden` squares of one sign: its relative error is below (hidden + 10) roundings, halved by the root
    scaling = (hidden + 20) * single
    assert_within(out, exact_out, (2.01 * unit + scaling) * exact_out.abs() + small)

    m = torch.ones_like(exact[1]) if mask is None else exact[2].detach()
    live = m != 0
    square = torch.where(live, exact[0].detach(), 0.0).square().sum(-1, keepdim=True)
    count = live.sum().clamp(min=1)
    r = (square / count + EPS).rsqrt()
    dh = dout.double().abs() * (exact[1].detach() * m).abs()
    pull = live * x.double().abs() * r**3 / count * (dh * x.double().abs()).sum(-1, keepdim=True)
    assert_within(ours[0].grad, exact[0].grad, unit * exact[0].grad.abs() + 3 * scaling * (r * dh + pull) + small)
    # both vectors' gradients are sums over tokens of dout * h, h rounded to the dtype
    columns = (dout.double() * x.double() * r).abs().sum(0)
    column_bound = (unit + (tokens + 20) * single + scaling) * columns
    assert_within(ours[1].grad, exact[1].grad, column_bound * m.abs() + small)
    if mask is not None:
        assert_within(ours[2].grad, exact[2].grad, column_bound * exact[1].detach().abs() + small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (33, 172), (300, 512), (4097, 24), (5, 12001)])
def test_agrees_with_float64(tokens, hidden, masked, dtype, device):
    x, weight, mask, dout = _case(tokens, hidden, dtype, device)
    _check(x, weight, mask if masked else None, dout)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 70), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
def test_agrees_at_any_size(device, tokens, hidden, dtype, masked, seed):
    x, weight, mask, dout = _case(tokens, hidden, dtype, device, seed)
    _check(x, weight, mask if masked else None, dout)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8)])
def test_empty_inputs(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1], device=device, requires_grad=True)
    mask = torch.ones(shape[-1], device=device, requires_grad=True)
    out = ops.rms_norm(x, weight, EPS, mask)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape and (weight.grad == 0).all() and (mask.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_ones_gives_the_bits_of_no_mask(dtype, device):
    x, weight, _, _ = _case(20, 96, dtype, device)
    ones = torch.ones(96, device=device)
    assert torch.equal(ops.rms_norm(x, weight, EPS), ops.rms_norm(x, weight, EPS, ones))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_zeros_gives_zeros(dtype, device):
    x, weight, mask, dout = _case(20, 96, dtype, device)
    x, mask = leaf(x), leaf(torch.zeros_like(mask))
    out = ops.rms_norm(x, weight, EPS, mask)
    out.backward(dout)
    assert (out == 0).all() and (x.grad == 0).all() and mask.grad.isfinite().all()


def test_dead_dimensions_are_left_out_of_the_mean_whatever_they_hold(device):
    x, weight, mask, _ = _case(7, 40, torch.float32, device)
    loud = torch.where(mask == 0, 1e18, x)
    assert torch.equal(ops.rms_norm(x, weight, EPS, mask), ops.rms_norm(loud, weight, EPS, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 5), (40, 16), (513, 40)])
def test_writes_every_element_and_no_other(tokens, hidden, dtype, device):
    x, weight, mask, dout = _case(tokens, hidden, dtype, device)
    guard = 64

    def poisoned(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((elements + guard,), float("nan"), dtype=dtype, device=device)

    with launching(x) as (library, executor):
        out, dx, r = poisoned(tokens * hidden, dtype), poisoned(tokens * hidden, dtype), poisoned(tokens)
        dweight, dmask, partial = poisoned(hidden), poisoned(hidden), poisoned(library.strip_count(tokens) * hidden)
        sizes = (tokens, hidden, dtype_code(x), executor)
        inputs = (x.data_ptr(), weight.data_ptr(), mask.data_ptr())
        library.masked_rms_norm_forward(*inputs, out.data_ptr(), r.data_ptr(), EPS, *sizes)
        gradients = (dx.data_ptr(), dweight.data_ptr(), dmask.data_ptr(), partial.data_ptr())
        library.masked_rms_norm_backward(dout.data_ptr(), *inputs, r.data_ptr(), *gradients, *sizes)
    for buffer in (out, r, dx, dweight, dmask, partial):
        assert buffer[:-guard].isfinite().all() and buffer[-guard:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    case = _case(700, 96, dtype, device)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            x, weight, mask = map(leaf, case[:3])
            out = ops.rms_norm(x, weight, EPS, mask)
            out.backward(case[3])
            results.append((out.detach(), x.grad, weight.grad, mask.grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_takes_strided_inputs_and_bf16_weights(device):
    x, weight, mask, dout = _case(24, 8, torch.bfloat16, device)
    weight, upstream = weight.bfloat16(), dout.view(4, 6, 8).transpose(0, 1)
    results = []
    for form in (x.view(4, 6, 8).transpose(0, 1), x.view(4, 6, 8).transpose(0, 1).contiguous()):
        ours, our_weight = leaf(form), leaf(weight)
        out = ops.rms_norm(ours, our_weight, EPS, mask)
        out.backward(upstream)
        results.append((out, ours.grad, our_weight.grad))
        _check(form.reshape(24, 8), weight.float(), mask, upstream.reshape(24, 8))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
def test_is_a_proper_torch_op(dtype, masked, device):
    x, weight, mask, _ = _case(6, 7, dtype, device)
    opcheck(masked_rms_norm, (leaf(x.view(2, 3, 7)), leaf(weight), leaf(mask) if masked else None, EPS))


def test_refuses_vectors_of_another_length(device):
    x = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match="weight must be"):
        ops.rms_norm(x, torch.ones(7, device=device), EPS)
    with pytest.raises(ValueError, match="mask must be"):
        ops.rms_norm(x, torch.ones(8, device=device), EPS, torch.ones(9, device=device))
