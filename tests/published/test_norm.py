"""The masked norm alone: the published one takes its variance in float32, so float64 is apart by float32's rounding."""

import pytest
import torch

from megashear import ops

from . import rounding
from .case import deviation

# Half of float32's last place in each of x, square, mean and root, and in fp32 in the two products too.
TOLERANCE = {torch.float64: 4 * 2**-24, torch.float32: 8 * 2**-24}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masked_plain_and_pruned_norms(arrays, dtype):
    x, z, w = (arrays[f"E/{name}"].to(dtype) for name in "xzw")
    live = z != 0
    for name, ours in (
        ("masked", ops.rms_norm(x, w, 1e-5, z)),
        ("plain", ops.rms_norm(x, w, 1e-5)),
        ("pruned", ops.rms_norm(x[..., live], (w * z)[live], 1e-5)),
    ):
        assert deviation(ours, arrays[f"E/out_{name}"]) < TOLERANCE[dtype], name
    assert deviation(ops.rms_norm(x, w, 1e-6, z), arrays["E/out_masked"]) > 10 * TOLERANCE[dtype], "eps is not seen"


def test_nothing_but_the_variances_rounding_differs(arrays):
    if not rounding.same_bits():
        pytest.skip("this host's float32 sums have other last bits than those of the published arrays")
    x, z, w = (arrays[f"E/{name}"] for name in "xzw")
    assert deviation(rounding.rms_norm(x, w, 1e-5, z), arrays["E/out_masked"]) < 1e-15
    assert deviation(rounding.rms_norm(x, w, 1e-5), arrays["E/out_plain"]) < 1e-15
