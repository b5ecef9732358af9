"""How near a kernel must come to the float64 reference: bounds from the roundings that its formula allows."""

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding to nearest."""


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Every element of `actual` is finite and within `bound` (float64, of its shape) of `exact`."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    worst = (error - bound).max().item() if error.numel() else 0.0
    assert torch.isfinite(actual).all() and worst <= 0, f"an element is {worst} beyond its bound"


def leaf(x: Tensor) -> Tensor:
    """The same values as a new leaf that wants a gradient."""
    return x.detach().clone().requires_grad_()


def wide(x: Tensor | None) -> Tensor | None:
    """The same values in float64, as a leaf that wants a gradient."""
    return None if x is None else leaf(x.double())
