"""What every kernel is held to: bounds from the roundings of its formula, equal bits every run, no stray writes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to nearest; fp16 has it from 2^-14 on."""

SMALL = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-25}
"""Largest error of rounding a number near zero: half of fp16's least; fp32 and bf16 may underflow far below."""

DTYPES = list(UNIT)
GUARD = 64
NAN = float("nan")


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


def assert_repeats(run: Callable[[], Sequence[Tensor]], runs: int = 100) -> None:
    """`run` gives the same bits every time, on one thread, two and three."""
    threads = torch.get_num_threads()
    try:
        results = []
        for i in range(runs):
            torch.set_num_threads((1, 2, 3)[i % 3])
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def poisoned(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory full of NaN for so many elements and a guard behind them."""
    return torch.full((elements + GUARD,), NAN, dtype=dtype, device=device)


def assert_filled(*buffers: Tensor) -> None:
    """Every element was written, and nothing behind them."""
    for buffer in buffers:
        assert buffer[:-GUARD].isfinite().all() and buffer[-GUARD:].isnan().all()


def cut_rows(x: Tensor, before: int, after: int, swap: bool) -> Tensor:
    """x [A, B, width] as part of wider rows full of NaN, the two leading dimensions exchanged in memory if `swap`."""
    first, second, width = x.shape
    room = x.new_full((second, first, before + width + after) if swap else (first, second, before + width + after), NAN)
    view = room[..., before : before + width]
    return (view.transpose(0, 1) if swap else view).copy_(x)
