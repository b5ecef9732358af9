"""Which attention serves a shape on a GPU: the kernel or torch's, by the clock of that GPU.

The first call with a shape computes both on random numbers. Where they differ by more than roundings, torch's serves
and a warning says so; else both are timed in turns, forward and backward with a mask's gradient, and the faster one
serves that shape for the rest of the process. So two GPUs or two runs may round differently, where both are about as
fast; MEGASHEAR_ATTENTION=compiled or =reference in the environment settles it. Read next: `attention.py`.
"""

import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from megashear.errors import ConfigError
from megashear.ops import reference
from megashear.ops.kernels.attention import masked_attention

logger = logging.getLogger(__name__)

ROUNDS = 5
"""Times that each form is timed; medians are compared."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative distance (2-norms) between the two forms' results: about 5 roundings to bf16 or fp16, where each
form rounds its probabilities, their gradients and its results; fp32 sums of some thousand terms."""

Form = Callable[[], list[Tensor]]
"""Computes the output and the gradients of its inputs."""


class Shape(NamedTuple):
    """What the choice depends on."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    tokens: int
    head_dim: int
    masked: bool
    documents: bool

    def __str__(self) -> str:
        parts = f"{self.heads} heads, {self.groups} groups, {self.tokens} tokens, head size {self.head_dim}"
        extras = ", documents" * self.documents + ", no masks" * (not self.masked)
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}, {parts}{extras}"


class Choice(NamedTuple):
    """Whether the kernel serves, and why: milliseconds of both, forward and backward, or the distance of results."""

    compiled: bool
    compiled_ms: float
    reference_ms: float
    distance: float

    def __str__(self) -> str:
        if math.isnan(self.compiled_ms):
            return f"torch's: the kernel's results are {self.distance:.1e} from it"
        name = "the kernel" if self.compiled else "torch's"
        return f"{name}: {self.compiled_ms:.3f} ms by the kernel, {self.reference_ms:.3f} ms by torch"


_CHOICES: dict[Shape, Choice] = {}


def forced() -> bool | None:
    """Whether MEGASHEAR_ATTENTION wants the kernel (compiled) or torch's (reference); None where it is unset.

    Raises ConfigError for another value.
    """
    wish = os.environ.get("MEGASHEAR_ATTENTION", "")
    if wish not in ("", "compiled", "reference"):
        raise ConfigError(f"MEGASHEAR_ATTENTION is {wish!r}: leave it unset, or set it to 'compiled' or 'reference'")
    return wish == "compiled" if wish else None


def kernel_is_chosen(
    q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, head_mask_H: Tensor | None, first_BS: Tensor | None
) -> bool:
    """Whether the kernel serves this call, by the environment, by what was measured, or by measuring now.

    While a CUDA graph is captured or torch.compile looks on, a shape that was not met before is not measured: torch's
    serves.
    """
    wish = forced()
    if wish is not None:
        return wish
    batch, heads, tokens, head_dim = q_BHSd.shape
    if q_BHSd.numel() == 0:
        return True
    facts = (heads, k_BGSd.shape[1], tokens, head_dim, head_mask_H is not None, first_BS is not None)
    shape = Shape(q_BHSd.device, q_BHSd.dtype, *facts)
    if shape not in _CHOICES:
        if torch.compiler.is_compiling() or (q_BHSd.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        with ThreadPoolExecutor(1) as apart:  # where no mode or hook of autograd's callers is in force
            _CHOICES[shape] = apart.submit(_measured, shape, batch, first_BS).result()
        logger.info("attention of %s: %s", shape, _CHOICES[shape])
    return _CHOICES[shape].compiled


def _measured(shape: Shape, batch: int, first_BS: Tensor | None) -> Choice:
    if shape.device.type != "cuda":
        return choose(*forms(shape, batch, first_BS), LIMITS[shape.dtype])
    with torch.cuda.device(shape.device):
        torch.cuda.synchronize()  # this thread has a stream of its own, and nothing else is to run beside what is timed
        return choose(*forms(shape, batch, first_BS), LIMITS[shape.dtype])


def choices() -> list[str]:
    """What was chosen so far in this process, one line a shape."""
    return [f"{shape}: {choice}" for shape, choice in _CHOICES.items()]


def forms(shape: Shape, batch: int, first_BS: Tensor | None) -> tuple[Form, Form]:
    """The kernel and torch's attention on equal random numbers, laid out as in a layer; torch's generators stay."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def rows(heads: int) -> Tensor:
        sizes = (shape.tokens, batch, heads, shape.head_dim)
        made = torch.randn(sizes, generator=generator, device=shape.device, dtype=shape.dtype)
        return made.permute(1, 2, 0, 3)

    leaves = [rows(heads).requires_grad_() for heads in (shape.heads, shape.groups, shape.groups)]
    mask_H = torch.ones(shape.heads, device=shape.device, requires_grad=True) if shape.masked else None
    wanted = leaves if mask_H is None else [*leaves, mask_H]
    dout, first = rows(shape.heads), None if first_BS is None else first_BS.clone()

    def run(attention: Callable[..., Tensor]) -> list[Tensor]:
        out = attention(*leaves, mask_H, first)
        return [out.detach(), *torch.autograd.grad(out, wanted, dout)]

    return lambda: run(lambda *inputs: masked_attention(*inputs)[0]), lambda: run(reference.attention)


def choose(compiled: Form, plain: Form, limit: float) -> Choice:
    """Compare the results of two forms, then their times; the kernel, `compiled`, must be right and the faster."""
    ours, theirs = compiled(), plain()
    distance = max(_distance(a, b) for a, b in zip(ours, theirs, strict=True))
    if not distance <= limit:
        choice = Choice(False, math.nan, math.nan, distance)
        warnings.warn(f"attention on {ours[0].device} is left to torch: {choice}, more than {limit:.0e}", stacklevel=2)
        return choice
    device = ours[0].device
    del ours, theirs
    times = [(_milliseconds(compiled, device), _milliseconds(plain, device)) for _ in range(ROUNDS)]
    compiled_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return Choice(compiled_ms <= reference_ms, compiled_ms, reference_ms, distance)


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def _milliseconds(form: Form, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        form()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    form()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
