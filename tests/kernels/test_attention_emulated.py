"""The CUDA kernels of attention, run thread by thread on the CPU, against float64: values, gradients, bits, banks."""

import pytest
import torch

from megashear.ops import reference
from megashear.ops.kernels import attention as kernel

from .agreement import DTYPES, assert_within, leaf, wide
from .attention_bounds import Case, bounds
from .test_attention import _case, _gradients

pytestmark = pytest.mark.usefixtures("emulated")

HALVES = [torch.bfloat16, torch.float16]
PARTS = ("out", "dq", "dk", "dv", "dmask")


def _attention(*inputs) -> torch.Tensor:
    return kernel.masked_attention(*inputs)[0]


def _ours(case: Case) -> list[torch.Tensor | None]:
    inputs = [None if x is None else leaf(x) for x in (case.q, case.k, case.v, case.mask)]
    return _gradients(_attention, *inputs, case.first, case.dout)


def _check(case: Case, pair: bool) -> None:
    exact_inputs = [wide(x) for x in (case.q, case.k, case.v, case.mask)]
    exact = _gradients(reference.attention, *exact_inputs, case.first, case.dout.double())
    for name, ours_part, exact_part, bound in zip(
        PARTS, _ours(case), exact, bounds(case, exact[0], pair), strict=True
    ):
        if ours_part is not None:
            print(name)  # the part that failed
            assert_within(ours_part, exact_part, bound + 1e-30)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "head_dim", "parts"),
    [
        (1, 1, 1, 1, 64, {}),
        (2, 2, 1, 33, 48, {"masked": True}),
        (1, 4, 2, 130, 64, {"masked": True, "documents": True}),
        (1, 2, 2, 64, 80, {"documents": True}),
        (1, 1, 1, 101, 96, {"masked": True}),
        (1, 3, 1, 193, 128, {"masked": True, "documents": True}),
        (1, 1, 1, 37, 7, {"masked": True}),
        (1, 1, 1, 20, 100, {}),
    ],
)
def test_tensor_cores_agree_with_float64(batch, heads, groups, tokens, head_dim, parts, dtype):
    _check(_case(batch, heads, groups, tokens, head_dim, dtype, **parts), pair=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "head_dim", "parts"),
    [
        (1, 1, 1, 1, {}),
        (4, 2, 50, 33, {"masked": True, "documents": True}),
        (2, 1, 17, 160, {"masked": True}),
        (1, 1, 40, 256, {"documents": True}),
    ],
)
def test_plain_kernels_agree_with_float64(heads, groups, tokens, head_dim, parts, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "TILES", "plain")
    _check(_case(1, heads, groups, tokens, head_dim, dtype, **parts), pair=False)
