"""Masked RMSNorm kernels against the float64 reference: values, gradients, any size, every element written."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.library import dtype_code, launching, matrix
from megashear.ops.kernels.rms_norm import masked_rms_norm

from .agreement import DTYPES, assert_filled, assert_repeats, assert_within, cut_rows, leaf, poisoned, wide
from .norm_bounds import EPS, norm_bounds


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
    bounds = norm_bounds(x, weight, mask, dout, {"out": exact_out, "dx": exact[0].grad})
    assert_within(out, exact_out, bounds.out)
    for vector, true, bound in zip(ours, exact, bounds[1:], strict=True):
        if vector is not None:
            assert_within(vector.grad, true.grad, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("tokens", "hidden"), [(300, 512), (4097, 24), (5, 12001)])
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


def test_masked_dimensions_do_not_affect_mean(device):
    x, weight, mask, _ = _case(7, 40, torch.float32, device)
    loud = torch.where(mask == 0, 1e18, x)
    assert torch.equal(ops.rms_norm(x, weight, EPS, mask), ops.rms_norm(loud, weight, EPS, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 5), (40, 16), (513, 40)])
def test_writes_every_element_and_no_other(tokens, hidden, dtype, device):
    x, weight, mask, dout = _case(tokens, hidden, dtype, device)
    size, vector = (tokens * hidden, dtype, device), (hidden, torch.float32, device)
    with launching(x) as (library, executor):
        out, dx, r = poisoned(*size), poisoned(*size), poisoned(tokens, torch.float32, device)
        dweight, dmask = poisoned(*vector), poisoned(*vector)
        partial = poisoned(library.strip_count(tokens) * hidden, torch.float32, device)
        end = (tokens, hidden, dtype_code(x), executor)
        vectors = (0, weight.data_ptr(), mask.data_ptr())
        none = (0, 0)
        library.masked_rms_norm_forward(matrix(x), none, *vectors, 0, out.data_ptr(), r.data_ptr(), EPS, *end)
        read = (matrix(dout), none, matrix(x), none, *vectors, r.data_ptr())
        written = (dx.data_ptr(), 0, dweight.data_ptr(), dmask.data_ptr(), 0, partial.data_ptr())
        library.masked_rms_norm_backward(*read, *written, *end)
    assert_filled(out, r, dx, dweight, dmask, partial)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    *case, dout = _case(700, 96, dtype, device)

    def run():
        x, weight, mask = map(leaf, case)
        out = ops.rms_norm(x, weight, EPS, mask)
        out.backward(dout)
        return out.detach(), x.grad, weight.grad, mask.grad

    assert_repeats(run)


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


def test_compiles_into_one_graph(device):
    x, weight, mask, dout = _case(6, 8, torch.float32, device)
    results = []
    for op in (ops.rms_norm, torch.compile(ops.rms_norm, backend="aot_eager", fullgraph=True)):
        leaves = [leaf(x), leaf(weight), leaf(mask)]
        out = op(leaves[0], leaves[1], EPS, leaves[2])
        out.backward(dout)
        results.append([out, *(y.grad for y in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(DTYPES), st.booleans())
def test_takes_rows_cut_from_wider_ones(device, before, after, dtype, swap):
    x, weight, mask, dout = _case(24, 8, dtype, device)
    results = []
    for form in (lambda y: y.view(4, 6, 8), lambda y: cut_rows(y.view(4, 6, 8), before, after, swap)):
        leaves = [form(x).detach().requires_grad_(), leaf(weight), leaf(mask)]
        out = ops.rms_norm(leaves[0], leaves[1], EPS, leaves[2])
        out.backward(form(dout))
        results.append([out, *(y.grad for y in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
