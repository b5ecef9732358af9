"""bf16 products through fp32: as exact as one rounding, other dtypes as they are, gradients too."""

from collections.abc import Iterator

import pytest
import torch

from megashear.engine.device import widen_bf16

BF16_ROUNDING = 2.0**-8


@pytest.fixture
def widened() -> Iterator[None]:
    library = widen_bf16()
    yield
    library._destroy()


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    one = torch.randn(3, 40, 700, generator=generator).to(dtype)
    return one, torch.randn(30, 700, generator=generator).to(dtype)


@pytest.mark.usefixtures("widened")
def test_a_product_is_rounded_once() -> None:
    one, weight = operands(torch.bfloat16)
    exact = one.double() @ weight.double().T
    for found in (torch.nn.functional.linear(one, weight), torch.bmm(one, weight.T.expand(3, -1, -1))):
        assert found.dtype is torch.bfloat16
        # fp32 sums of 700 addends on top: at most 700 roundings of the sum of their sizes.
        slack = BF16_ROUNDING * exact.abs() + 700 * 2.0**-24 * (one.double().abs() @ weight.double().abs().T)
        assert ((found.double() - exact).abs() <= slack).all()


@pytest.mark.usefixtures("widened")
def test_gradients_are_those_of_the_product() -> None:
    one, weight = (tensor.requires_grad_() for tensor in operands(torch.bfloat16))
    torch.nn.functional.linear(one, weight).square().sum().backward()
    wide_one, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (one, weight))
    torch.nn.functional.linear(wide_one, wide_weight).square().sum().backward()
    for narrow, wide in ((one, wide_one), (weight, wide_weight)):
        assert narrow.grad is not None and wide.grad is not None and narrow.grad.dtype is torch.bfloat16
        error = (narrow.grad.double() - wide.grad).abs().max() / wide.grad.abs().max()
        assert error < 3 * BF16_ROUNDING  # the product, its double and the gradient are each rounded


def test_other_dtypes_keep_their_bits() -> None:
    plain = [torch.nn.functional.linear(*operands(dtype)) for dtype in (torch.float32, torch.float64)]
    library = widen_bf16()
    try:
        for before in plain:
            assert torch.equal(torch.nn.functional.linear(*operands(before.dtype)), before)
    finally:
        library._destroy()
