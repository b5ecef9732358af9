"""Residual addition and masked RMSNorm in one kernel, against float64 and against the two ops apart."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.library import dtype_code, launching, matrix
from megashear.ops.kernels.rms_norm import add_rms_norm

from .agreement import DTYPES, SMALL, UNIT, assert_filled, assert_repeats, assert_within, cut_rows, leaf, poisoned, wide
from .norm_bounds import EPS, norm_bounds

MASKS = [(True, True), (True, False), (False, True), (False, False)]
"""Whether there is a branch mask, and a hidden mask."""


def _case(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, masks=(True, True), seed: int = 0):
    """Residual, branch, branch mask, weight and mask; then the gradients of sum and norm."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(tokens, hidden, generator=generator).to(dtype).to(device) for _ in range(4)]
    vectors = [torch.randn(hidden, generator=generator).to(device) for _ in range(3)]
    live = (torch.rand(hidden, generator=generator) < 0.7).to(device)
    branch_mask = vectors[0].sigmoid() * live if masks[0] else None
    mask = vectors[2].sigmoid() * live if masks[1] else None
    return (matrices[0], matrices[1], branch_mask, vectors[1], mask), matrices[2:]


def _apply(op, inputs):
    x, branch, branch_mask, weight, mask = inputs
    return op(x, branch, branch_mask, weight, EPS, mask)


def _leaves(inputs):
    return [None if x is None else leaf(x) for x in inputs]


def _check(inputs, upstream) -> None:
    """Forward and backward, each against float64 at the values that it was given."""
    ours = _leaves(inputs)
    outputs = _apply(ops.add_rms_norm, ours)
    torch.autograd.backward(outputs, upstream)
    x, branch, branch_mask, weight, mask = inputs
    dtotal, dout = (d.double() for d in upstream)
    unit, single, small = UNIT[x.dtype], UNIT[torch.float32], SMALL[x.dtype]
    factor = torch.ones_like(weight, dtype=torch.float64) if branch_mask is None else branch_mask.double()
    exact_total = x.double() + branch.double() * factor
    addition = 2 * single * (x.double().abs() + (branch.double() * factor).abs())
    assert_within(outputs[0], exact_total, unit * exact_total.abs() + (1 + unit) * addition + small)

    total, exact_weight, exact_mask = wide(outputs[0]), wide(weight), wide(mask)
    exact = reference.rms_norm(total, exact_weight, EPS, exact_mask)
    exact.backward(dout)
    dx = total.grad + dtotal
    bounds = norm_bounds(outputs[0].detach(), weight, mask, upstream[1], {"out": exact, "dx": total.grad})
    wide_error = bounds.dx + 2 * single * (dtotal.abs() + total.grad.abs())  # before the last rounding
    assert_within(outputs[1], exact, bounds.out)
    assert_within(ours[0].grad, dx, wide_error + unit * dx.abs())
    assert_within(ours[1].grad, dx * factor, wide_error * factor + unit * (dx * factor).abs() + small)
    assert_within(ours[3].grad, exact_weight.grad, bounds.dweight)
    if mask is not None:
        assert_within(ours[4].grad, exact_mask.grad, bounds.dmask)
    if branch_mask is not None:
        terms = (dx * branch.double()).abs().sum(0)
        bound = (wide_error * branch.double().abs()).sum(0) + (len(x) + 20) * single * terms + small
        assert_within(ours[2].grad, (dx * branch.double()).sum(0), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("tokens", "hidden"), [(300, 512), (3, 9001)])
def test_agrees_with_float64(tokens, hidden, masks, dtype, device):
    _check(*_case(tokens, hidden, dtype, device, masks))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 70), st.integers(1, 70), st.sampled_from(DTYPES), st.sampled_from(MASKS), st.integers(0, 2**31))
def test_agrees_at_any_size(device, tokens, hidden, dtype, masks, seed):
    _check(*_case(tokens, hidden, dtype, device, masks, seed))


@pytest.mark.parametrize("masks", MASKS)
def test_agrees_with_the_whole_reference_in_fp32(masks, device):
    inputs, upstream = _case(40, 24, torch.float32, device, masks)
    ours, exact = _leaves(inputs), [wide(x) for x in inputs]
    torch.autograd.backward(_apply(ops.add_rms_norm, ours), upstream)
    torch.autograd.backward(_apply(reference.add_rms_norm, exact), [d.double() for d in upstream])
    for a, b in zip(ours, exact, strict=True):
        assert a is None or torch.allclose(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_exactly_the_sum_that_it_returns(dtype, device):
    inputs, _ = _case(20, 96, dtype, device)
    total, out = _apply(ops.add_rms_norm, inputs)
    assert torch.equal(out, ops.rms_norm(total, inputs[3], EPS, inputs[4]))
    ones = torch.ones(96, device=device)
    plain = ops.add_rms_norm(inputs[0], inputs[1], None, inputs[3], EPS)
    assert torch.equal(plain[0], inputs[0] + inputs[1])
    assert all(map(torch.equal, plain, ops.add_rms_norm(inputs[0], inputs[1], ones, inputs[3], EPS, ones)))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used, masks, device):
    inputs, upstream = _case(9, 16, torch.float32, device, masks)
    ours, exact = _leaves(inputs), [wide(x) for x in inputs]
    _apply(ops.add_rms_norm, ours)[used].backward(upstream[used])
    _apply(reference.add_rms_norm, exact)[used].backward(upstream[used].double())
    for a, b in zip(ours, exact, strict=True):
        if a is not None:
            expected = torch.zeros_like(a) if b.grad is None else b.grad.float()
            torch.testing.assert_close(a.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8)])
def test_empty_inputs(shape, device):
    x, branch = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    vectors = [torch.ones(shape[-1], device=device, requires_grad=True) for _ in range(3)]
    total, out = ops.add_rms_norm(x, branch, vectors[0], vectors[1], EPS, vectors[2])
    (total.sum() + out.sum()).backward()
    assert total.shape == out.shape == x.grad.shape == branch.grad.shape == shape
    assert all((vector.grad == 0).all() for vector in vectors)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.integers(0, 9), st.sampled_from(DTYPES), st.booleans())
def test_takes_any_strides(device, before, after, dtype, swap):
    inputs, upstream = _case(24, 8, dtype, device)

    def cut(x: torch.Tensor) -> torch.Tensor:
        return cut_rows(x.view(4, 6, 8), before, after, swap)

    straight, strided = _leaves(inputs), _leaves(inputs)
    for i in (0, 1):
        straight[i], strided[i] = leaf(inputs[i].view(4, 6, 8)), cut(inputs[i]).requires_grad_()
    results = []
    for leaves, gradients in ((straight, [d.view(4, 6, 8) for d in upstream]), (strided, [cut(d) for d in upstream])):
        outputs = _apply(ops.add_rms_norm, leaves)
        torch.autograd.backward(outputs, gradients)
        results.append([*outputs, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 5), (40, 16), (513, 40)])
def test_writes_every_element_and_no_other(tokens, hidden, dtype, device):
    (x, branch, *vectors), (dtotal, dout) = _case(tokens, hidden, dtype, device)
    size, width = (tokens * hidden, dtype, device), (hidden, torch.float32, device)
    with launching(x) as (library, executor):
        total, out, dx, dbranch = (poisoned(*size) for _ in range(4))
        dweight, dmask, dbranch_mask = (poisoned(*width) for _ in range(3))
        r = poisoned(tokens, torch.float32, device)
        partial = poisoned(2 * library.strip_count(tokens) * hidden, torch.float32, device)
        end = (tokens, hidden, dtype_code(x), executor)
        pointers = [vector.data_ptr() for vector in vectors]
        written = (total.data_ptr(), out.data_ptr(), r.data_ptr())
        library.masked_rms_norm_forward(matrix(x), matrix(branch), *pointers, *written, EPS, *end)
        sums = (total.data_ptr(), hidden)
        read = (matrix(dout), matrix(dtotal), sums, matrix(branch), *pointers, r.data_ptr())
        written = (dx, dbranch, dweight, dmask, dbranch_mask, partial)
        library.masked_rms_norm_backward(*read, *(buffer.data_ptr() for buffer in written), *end)
    assert_filled(total, out, r, *written)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    inputs, upstream = _case(700, 96, dtype, device)

    def run():
        leaves = _leaves(inputs)
        outputs = _apply(ops.add_rms_norm, leaves)
        torch.autograd.backward(outputs, upstream)
        return *outputs, *(x.grad for x in leaves)

    assert_repeats(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", MASKS)
def test_is_a_proper_torch_op(dtype, masks, device):
    inputs, _ = _case(6, 7, dtype, device, masks)
    opcheck(add_rms_norm, (*_leaves(inputs), EPS))


def test_compiles_into_one_graph(device):
    inputs, upstream = _case(6, 8, torch.float32, device)
    results = []
    for op in (ops.add_rms_norm, torch.compile(ops.add_rms_norm, backend="aot_eager", fullgraph=True)):
        leaves = _leaves(inputs)
        outputs = _apply(op, leaves)
        torch.autograd.backward(outputs, upstream)
        results.append([*outputs, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refuses_what_does_not_fit(device):
    x, ones = torch.zeros(3, 8, device=device), torch.ones(8, device=device)
    for branch in (torch.zeros(3, 7, device=device), torch.zeros(3, 8, device=device).bfloat16()):
        with pytest.raises(ValueError, match="the branch must be"):
            ops.add_rms_norm(x, branch, None, ones, EPS)
    with pytest.raises(ValueError, match="branch mask must be"):
        ops.add_rms_norm(x, x, torch.ones(9, device=device), ones, EPS)
