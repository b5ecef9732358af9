"""Which attention serves a shape on a GPU: one of the kernels or torch's, by the clock of that GPU.

All of them are computed on random numbers. A kernel whose results differ from torch's by more than roundings is left
out with a warning; the rest are timed in turns, forward and backward with a mask's gradient, and the fastest serves
that shape for the rest of the process. Training settles its shapes before the first step, by rank 0's clock for all
ranks (`settle`), so that ranks and resumed runs round alike; any other shape is measured at its first call.
MEGASHEAR_ATTENTION in the environment takes one form for all shapes. Read next: `attention.py`,
`megashear/phases/attention_choice.py`.
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
from megashear.ops.kernels.attention import attention_serves, kernel_names, masked_attention

logger = logging.getLogger(__name__)

ROUNDS = 5
"""Times that each form is timed; medians are compared."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative distance (2-norms) between a kernel's results and torch's: about 5 roundings to bf16 or fp16, where
each form rounds its probabilities, their gradients and its results; fp32 sums of some thousand terms."""

MEASURED = ("cuda",)
"""Types of devices whose clock decides; on the CPU the machine and the dtype do."""

REFERENCE = "reference"
"""The name of torch's attention; the kernels have those of the library's `masked_attention_tiles`."""

WISHES = ("compiled", REFERENCE, "wgmma", "tensor_cores", "plain")

Form = Callable[[], list[Tensor]]
"""Computes the output and the gradients of its inputs."""


class Shape(NamedTuple):
    """What the choice depends on. Heads are no part of it: their number falls while a model is pruned."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    head_dim: int
    documents: bool

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        extra = ", documents" * self.documents
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name}, {dtype}, {self.tokens} tokens, head size {self.head_dim}{extra}"


class Sample(NamedTuple):
    """The sizes that a shape is measured with: sequences, query heads, groups, and whether heads have masks."""

    batch: int
    heads: int
    groups: int
    masked: bool


class Choice(NamedTuple):
    """What serves, and why: milliseconds of each form that was timed, forward and backward (empty: not measured here),
    and distances of the kernels' results from torch's.
    """

    serves: str
    milliseconds: dict[str, float]
    distances: dict[str, float]

    def __str__(self) -> str:
        times = [f"{milliseconds:.3f} ms by {name}" for name, milliseconds in self.milliseconds.items()]
        left_out = [name for name in self.distances if name not in self.milliseconds]
        wrong = [f"{name} is {self.distances[name]:.1e} off" for name in left_out]
        return ", ".join([self.serves, *times, *wrong])


_CHOICES: dict[Shape, Choice] = {}


def forced() -> str | None:
    """The form that MEGASHEAR_ATTENTION names: compiled (the best kernel), reference (torch's), or a kernel; None where
    it is unset.

    A kernel that does not serve a shape or a GPU gives way to the best one that does. Raises ConfigError for another
    value.
    """
    wish = os.environ.get("MEGASHEAR_ATTENTION", "")
    if wish not in ("", *WISHES):
        raise ConfigError(f"MEGASHEAR_ATTENTION is {wish!r}: leave it unset, or set it to one of {', '.join(WISHES)}")
    return wish or None


def serving(q_BHSd: Tensor, k_BGSd: Tensor, head_mask_H: Tensor | None, first_BS: Tensor | None) -> str:
    """The form for this call: the name of a kernel, `compiled` for the best one, or `reference`.

    By the environment, by what was settled or measured, or by measuring now. While a CUDA graph is captured or
    torch.compile looks on, a shape that was not met before is not measured: torch's serves.
    """
    wish = forced()
    if wish is not None:
        return wish
    batch, heads, tokens, head_dim = q_BHSd.shape
    if q_BHSd.numel() == 0:
        return "compiled"
    shape = Shape(q_BHSd.device, q_BHSd.dtype, tokens, head_dim, first_BS is not None)
    if shape not in _CHOICES:
        if torch.compiler.is_compiling() or (q_BHSd.is_cuda and torch.cuda.is_current_stream_capturing()):
            return REFERENCE
        settle(shape, measure(shape, Sample(batch, heads, k_BGSd.shape[1], head_mask_H is not None)))
    return _CHOICES[shape].serves


def is_measured(shape: Shape) -> bool:
    """Whether a clock decides what serves a shape: on a GPU with kernels for it, and no wish in the environment."""
    return (
        shape.device.type in MEASURED
        and forced() is None
        and attention_serves(shape.device, shape.dtype, shape.head_dim)
    )


def settle(shape: Shape, choice: Choice) -> None:
    """Have this process serve a shape so from here on; a kernel that this GPU lacks gives way to its best one."""
    _CHOICES[shape] = choice
    logger.info("attention of %s: %s", shape, choice)


def measure(shape: Shape, sample: Sample) -> Choice:
    """Compare and time all forms. Under any mode of torch: it is done in a thread apart, where none is in force."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_measured, shape, sample).result()


def _measured(shape: Shape, sample: Sample) -> Choice:
    if shape.device.type != "cuda":
        return choose(forms(shape, sample), LIMITS[shape.dtype])
    with torch.cuda.device(shape.device):
        torch.cuda.synchronize()  # this thread has a stream of its own, and nothing else is to run beside what is timed
        return choose(forms(shape, sample), LIMITS[shape.dtype])


def choices() -> list[str]:
    """What was chosen so far in this process, one line a shape."""
    return [f"{shape}: {choice}" for shape, choice in _CHOICES.items()]


def forms(shape: Shape, sample: Sample) -> dict[str, Form]:
    """The kernels and torch's attention on equal random numbers, laid out as in a layer; torch's generators stay.

    Documents are four to a sequence, of different lengths.
    """
    generator = torch.Generator(shape.device).manual_seed(0)

    def rows(heads: int) -> Tensor:
        sizes = (shape.tokens, sample.batch, heads, shape.head_dim)
        made = torch.randn(sizes, generator=generator, device=shape.device, dtype=shape.dtype)
        return made.permute(1, 2, 0, 3)

    leaves = [rows(heads).requires_grad_() for heads in (sample.heads, sample.groups, sample.groups)]
    mask_H = torch.ones(sample.heads, device=shape.device, requires_grad=True) if sample.masked else None
    wanted = leaves if mask_H is None else [*leaves, mask_H]
    dout, first_BS = rows(sample.heads), None
    if shape.documents:
        starts = torch.zeros(shape.tokens, dtype=torch.int32, device=shape.device)
        for tenth in (1, 3, 6):
            starts[tenth * shape.tokens // 10 :] = tenth * shape.tokens // 10
        first_BS = starts.expand(sample.batch, -1).contiguous()

    def run(attention: Callable[..., Tensor]) -> list[Tensor]:
        out = attention(*leaves, mask_H, first_BS)
        return [out.detach(), *torch.autograd.grad(out, wanted, dout)]

    def kernel(name: str) -> Form:
        return lambda: run(lambda *inputs: masked_attention(*inputs, name)[0])

    kernels = {name: kernel(name) for name in kernel_names(shape.device, shape.dtype)}
    return kernels | {REFERENCE: lambda: run(reference.attention)}


def choose(contenders: dict[str, Form], limit: float) -> Choice:
    """Compare the results of all forms with `reference`, the last one, then the times of those that are right."""
    plain = contenders[REFERENCE]
    theirs = plain()
    device = theirs[0].device
    distances: dict[str, float] = {}
    for name, form in contenders.items():
        if name == REFERENCE:
            continue
        distances[name] = max(_distance(a, b) for a, b in zip(form(), theirs, strict=True))
        if not distances[name] <= limit:
            found = f"the kernel's results are {distances[name]:.1e} from torch's, more than {limit:.0e}"
            warnings.warn(f"attention on {device} is not left to {name}: {found}", stacklevel=2)
    del theirs
    right = {name: form for name, form in contenders.items() if distances.get(name, 0.0) <= limit}
    if len(right) == 1:
        return Choice(REFERENCE, {}, distances)
    rounds = [{name: _milliseconds(form, device) for name, form in right.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in right}
    return Choice(min(medians, key=lambda name: medians[name]), medians, distances)


def _distance(a: Tensor, b: Tensor) -> float:
    found = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(found) else found


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
    taken: float = begin.elapsed_time(end)
    return taken
