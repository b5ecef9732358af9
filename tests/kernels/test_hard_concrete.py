"""Noise and hard concrete kernels: the bits of the numpy noise, the float64 sample and its slope."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels import hard_concrete as kernel
from megashear.ops.kernels.library import launching

from .agreement import assert_filled, assert_repeats, leaf, poisoned, wide

indices = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-(2**63), 2**64 - 1), indices, indices, indices, st.integers(0, 3000))
def test_noise_has_the_bits_of_numpy(device, seed, step, micro_batch, granularity, units):
    ours = ops.mask_noise(seed, step, micro_batch, granularity, units, device)
    assert torch.equal(ours.cpu(), reference.mask_noise(seed, step, micro_batch, granularity, units))


def test_noise_has_the_bits_of_numpy_at_the_clipped_ends(device):
    ours = ops.mask_noise(1, 2, 3, 4, 8_000_001, device).cpu()
    assert torch.equal(ours, reference.mask_noise(1, 2, 3, 4, 8_000_001))
    assert (ours == 17 / 2**24).any() and (ours == 1 - 17 / 2**24).any()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3000), st.floats(-6, 6), st.integers(0, 2**31))
def test_sample_and_slope_agree_with_float64(device, units, centre, seed):
    log_alpha = centre + 2 * torch.randn(units, generator=torch.Generator().manual_seed(seed))
    noise = reference.mask_noise(seed, 0, 0, 0, units)
    _check(log_alpha.to(device), noise.to(device))


def _check(log_alpha: torch.Tensor, noise: torch.Tensor) -> None:
    ours, exact = leaf(log_alpha), wide(log_alpha)
    z, exact_z = ops.hard_concrete(ours, noise), reference.hard_concrete(exact, noise.double())
    z.sum().backward()
    exact_z.sum().backward()
    # The logit sums terms below 14, so it errs by a few times 14 * 2^-24; s' is at most 1/4, z' 0.45 and z'' 0.3.
    error = 1.5 * 8 * 14 * 2.0**-24
    torch.testing.assert_close(z.double(), exact_z, rtol=0, atol=0.45 * error)
    inside = (exact_z > error) & (exact_z < 1 - error)
    torch.testing.assert_close(ours.grad.double()[inside], exact.grad[inside], rtol=0, atol=error)
    assert (ours.grad[(z == 0) | (z == 1)] == 0).all()
    assert (ours.grad[(z > 0) & (z < 1)] > 0).all()


def test_bounds_are_exact_zeros_and_ones(device):
    log_alpha = torch.tensor([-20.0, 20.0, 0.0, -200.0, 200.0], device=device, requires_grad=True)
    z = ops.hard_concrete(log_alpha, torch.full((5,), 0.5, device=device))
    z.sum().backward()
    assert z[[0, 3]].tolist() == [0, 0] and z[[1, 4]].tolist() == [1, 1] and z[2] == 0.5
    assert log_alpha.grad[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0] and abs(log_alpha.grad[2] - 0.45) < 1e-6


def test_nan_propagates(device):
    log_alpha = torch.tensor([float("nan"), 1.0], device=device)
    assert ops.hard_concrete(log_alpha, torch.full((2,), 0.5, device=device)).isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5, 7), (2, 3, 4)])
def test_one_launch_is_noise_then_sample(shape, device):
    log_alpha = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    fused, apart = leaf(log_alpha), leaf(log_alpha)
    noise = ops.mask_noise(-9, 8, 7, 6, log_alpha.numel(), device).view(shape)
    z = ops.sample_hard_concrete(fused, -9, 8, 7, 6)
    expected = ops.hard_concrete(apart, noise)
    assert torch.equal(z, expected) and z.shape == shape
    z.sum().backward()
    expected.sum().backward()
    assert torch.equal(fused.grad, apart.grad)


def test_strided_log_alpha_counts_units_in_row_major_order(device):
    log_alpha = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    strided = log_alpha.t()
    expected = ops.sample_hard_concrete(strided.contiguous(), 1, 2, 3, 4)
    assert torch.equal(ops.sample_hard_concrete(strided, 1, 2, 3, 4), expected)


def test_writes_every_element_and_no_other(device):
    units = 1029
    log_alpha = torch.randn(units, device=device)
    z, slope, noise = (poisoned(units, torch.float32, device) for _ in range(3))
    with launching(log_alpha) as (library, executor):
        library.hard_concrete_noise(1, 2, 3, 4, noise.data_ptr(), units, executor)
        addresses = (z.data_ptr(), slope.data_ptr())
        library.hard_concrete_sample(log_alpha.data_ptr(), 0, 1, 2, 3, 4, *addresses, units, executor)
    assert_filled(z, slope, noise)


def test_repeats_bit_for_bit_on_any_number_of_threads(device):
    log_alpha = torch.randn(30_000, generator=torch.Generator().manual_seed(0)).to(device)

    def run():
        x = leaf(log_alpha)
        z = ops.sample_hard_concrete(x, 5, 6, 7, 8)
        z.sum().backward()
        return z.detach(), x.grad

    assert_repeats(run)


@pytest.mark.parametrize("form", [ops.sample_hard_concrete, ops.hard_concrete])
def test_compiles_into_one_graph(form, device):
    log_alpha = torch.randn(12, generator=torch.Generator().manual_seed(0)).to(device)
    rest = (5, 6, 7, 8) if form is ops.sample_hard_concrete else (torch.full((12,), 0.4, device=device),)
    results = []
    for op in (form, torch.compile(form, backend="aot_eager", fullgraph=True)):
        x = leaf(log_alpha)
        z = op(x, *rest)
        z.sum().backward()
        results.append((z, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_are_proper_torch_ops(device):
    log_alpha = torch.randn(3, 5, device=device)
    opcheck(kernel.sample_hard_concrete, (leaf(log_alpha), -3, 2, 1, 0))
    opcheck(kernel.hard_concrete, (leaf(log_alpha), torch.full((3, 5), 0.4, device=device)))


def test_refuses_wrong_noise_shape_and_large_indices(device):
    log_alpha = torch.zeros(4, device=device)
    with pytest.raises(ValueError, match="uniform must be"):
        ops.hard_concrete(log_alpha, torch.full((5,), 0.5, device=device))
    with pytest.raises(ValueError, match="outside"):
        ops.sample_hard_concrete(log_alpha, 0, -1, 0, 0)
    with pytest.raises(ValueError, match="outside"):
        ops.mask_noise(0, 0, 0, 2**32, 4, device)
