"""The CUDA kernels' own sources, run thread by thread on the CPU, against float64: values, gradients, orders, bounds.

No GPU is needed: cuda_emulation/ compiles csrc/*/cuda.cu with g++. What it cannot tell is speed.
"""

import pytest
import torch

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels import live_weight

from . import test_add_rms_norm, test_cross_entropy, test_hard_concrete, test_rms_norm, test_rope, test_swiglu
from .agreement import DTYPES, leaf

pytestmark = pytest.mark.usefixtures("emulated")

CPU = torch.device("cpu")

SIZES = [(1, 1), (33, 172), (5, 2049), (40, 16)]
"""Tokens and columns: packs of 16 bytes and single elements, several strips, part of a block, more than one block."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_swiglu_agrees(tokens, features, dtype):
    gate_up, mask, dout = test_swiglu._case(tokens, features, dtype, CPU)
    test_swiglu._check(gate_up, mask, dout)
    test_swiglu._check(gate_up, None, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [*SIZES, (2, 6168)])
def test_rms_norm_agrees(tokens, hidden, dtype):
    x, weight, mask, dout = test_rms_norm._case(tokens, hidden, dtype, CPU)
    test_rms_norm._check(x, weight, mask, dout)
    test_rms_norm._check(x, weight, None, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", test_add_rms_norm.MASKS)
@pytest.mark.parametrize(("tokens", "hidden"), [(33, 172), (2, 6168), (3, 5)])
def test_add_rms_norm_agrees(tokens, hidden, masks, dtype):
    test_add_rms_norm._check(*test_add_rms_norm._case(tokens, hidden, dtype, CPU, masks))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (9, 2, 2, 3, 32), (7, 1, 3, 2, 5)])
def test_rope_agrees(sizes, dtype):
    test_rope._check(*test_rope._case(*sizes, dtype, CPU))


@pytest.mark.parametrize("units", [1, 1029, 3000])
def test_hard_concrete_noise_and_samples(units):
    noise = ops.mask_noise(2**63 + 5, 1, 2, 3, units)
    assert torch.equal(noise, reference.mask_noise(2**63 + 5, 1, 2, 3, units))
    log_alpha = 2 * torch.randn(units, generator=torch.Generator().manual_seed(units))
    test_hard_concrete._check(log_alpha, noise)
    assert torch.equal(ops.sample_hard_concrete(log_alpha, 2**63 + 5, 1, 2, 3), ops.hard_concrete(log_alpha, noise))


@pytest.mark.parametrize("dtype", test_cross_entropy.DTYPES)
@pytest.mark.parametrize(("tokens", "width", "columns"), [(1, 1, 1), (9, 172, 170), (5, 2056, 2000), (3, 1001, 1000)])
def test_cross_entropy_agrees(tokens, width, columns, dtype):
    case = test_cross_entropy._case(tokens, width, dtype, CPU)
    test_cross_entropy._check(*case, 1000, columns, overwrite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 300), (30, 513)])
@pytest.mark.parametrize("some", [(True, True), (True, False), (False, True)])
def test_live_weight_agrees(height, width, dtype, some):
    generator = torch.Generator().manual_seed(height)
    weight = torch.randn(height, width, generator=generator).to(dtype)
    indices = [
        torch.nonzero(torch.rand(size, generator=generator) < 0.5).flatten() if part else None
        for size, part in zip((height, width), some, strict=True)
    ]
    live = live_weight.live_gather(weight, *indices)
    assert torch.equal(live, reference.live_gather(weight, *indices))
    found = torch.randn(height, width, generator=generator)
    expected = found.clone()
    live_weight.live_add(found, *indices, live)
    reference.live_add(expected, *indices, live)
    assert torch.equal(found, expected)


def test_the_order_of_threads_changes_no_bit(emulated):
    """Else a barrier is missing: threads of one block, and blocks, run from first to last and from last to first."""
    gate_up, mask, dout = test_swiglu._case(33, 172, torch.bfloat16, CPU)
    (x, branch, *vectors), upstream = test_add_rms_norm._case(33, 172, torch.bfloat16, CPU)
    logits, labels, dterms = test_cross_entropy._case(9, 172, torch.bfloat16, CPU)

    def run() -> list[torch.Tensor]:
        leaves = [leaf(part) for part in (gate_up, mask, x, branch, *vectors, logits)]
        ops.swiglu(leaves[0], leaves[1]).backward(dout)
        summed = ops.add_rms_norm(*leaves[2:6], 1e-5, leaves[6])
        torch.autograd.backward(summed, upstream)
        terms = ops.cross_entropy_terms(leaves[7], labels)
        torch.autograd.backward(terms, tuple(dterms))
        return [*summed, *terms, *(part.grad for part in leaves)]

    results = []
    for descending in (False, True, False):
        emulated.descend(descending)
        results.append(run())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
