"""Select the attention backend of each shape on a GPU, a kernel or torch's, by measuring.

All backends are computed on random numbers. A kernel whose results differ from torch's by more than rounding is
excluded with a warning. The others are timed in alternation, forward and backward with the gradient of a mask, and the
process uses the fastest for that shape. Training sets its shapes before the first step from rank 0's times
(`set_choice`), so that ranks and resumed runs round alike. Other shapes are measured at their first call.
MEGASHEAR_ATTENTION forces one backend for all shapes.
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
"""Timings of each backend; their medians are compared."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative distance (2-norm) between a kernel's results and torch's: about 5 roundings to bf16 or fp16 of
probabilities, their gradients and results, or fp32 sums of some thousand terms."""

MEASURED = ("cuda",)
"""Device types on which backends are measured; on the CPU the machine and the dtype decide."""

REFERENCE = "reference"
"""Name of torch's attention. The kernels' names come from the library's `masked_attention_tiles`."""

FORCED_BACKENDS = ("compiled", REFERENCE, "wgmma", "tensor_cores", "plain")

Form = Callable[[], list[Tensor]]
"""Computes the output and the gradients of the inputs."""


class Shape(NamedTuple):
    """Key of a choice. The number of heads is not included, because it falls while a model is pruned."""

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
    """Sizes used to measure a shape: sequences, query heads, groups, and whether heads have masks."""

    batch: int
    heads: int
    groups: int
    masked: bool


class Choice(NamedTuple):
    """A selected backend and its evidence.

    Attributes:
        serves: Name of the backend.
        milliseconds: Forward and backward time of each backend; empty if not measured in this process.
        distances: Relative distance of each kernel's results from torch's.
    """

    serves: str
    milliseconds: dict[str, float]
    distances: dict[str, float]

    def __str__(self) -> str:
        times = [f"{milliseconds:.3f} ms by {name}" for name, milliseconds in self.milliseconds.items()]
        excluded = [name for name in self.distances if name not in self.milliseconds]
        wrong = [f"{name} is {self.distances[name]:.1e} off" for name in excluded]
        return ", ".join([self.serves, *times, *wrong])


_CHOICES: dict[Shape, Choice] = {}


def forced() -> str | None:
    """Return the backend that MEGASHEAR_ATTENTION forces, None if it is unset.

    Values: compiled (the best kernel), reference (torch's), or the name of a kernel. A kernel that does not support a
    shape or a GPU is replaced by the best one that does.

    Raises:
        ConfigError: If the value is unknown.
    """
    value = os.environ.get("MEGASHEAR_ATTENTION", "")
    if value not in ("", *FORCED_BACKENDS):
        raise ConfigError(
            f"MEGASHEAR_ATTENTION is {value!r}: leave it unset, or set it to one of {', '.join(FORCED_BACKENDS)}"
        )
    return value or None


def serving(q_BHSd: Tensor, k_BGSd: Tensor, head_mask_H: Tensor | None, first_BS: Tensor | None) -> str:
    """Return the backend of a call: the name of a kernel, `compiled` for the best one, or `reference`.

    Taken from the environment, an earlier choice, or a measurement now. During the capture of a CUDA graph or under
    torch.compile, a new shape is not measured and uses torch's attention.
    """
    name = forced()
    if name is not None:
        return name
    batch, heads, tokens, head_dim = q_BHSd.shape
    if q_BHSd.numel() == 0:
        return "compiled"
    shape = Shape(q_BHSd.device, q_BHSd.dtype, tokens, head_dim, first_BS is not None)
    if shape not in _CHOICES:
        if torch.compiler.is_compiling() or (q_BHSd.is_cuda and torch.cuda.is_current_stream_capturing()):
            return REFERENCE
        set_choice(shape, measure(shape, Sample(batch, heads, k_BGSd.shape[1], head_mask_H is not None)))
    return _CHOICES[shape].serves


def is_measured(shape: Shape) -> bool:
    """Return whether the backend of a shape is measured: on a GPU with kernels for it, unless one is forced."""
    return (
        shape.device.type in MEASURED
        and forced() is None
        and attention_serves(shape.device, shape.dtype, shape.head_dim)
    )


def set_choice(shape: Shape, choice: Choice) -> None:
    """Use a backend for a shape in this process. A kernel that this GPU lacks is replaced by the best one."""
    _CHOICES[shape] = choice
    logger.info("attention of %s: %s", shape, choice)


def measure(shape: Shape, sample: Sample) -> Choice:
    """Compare and time all backends, in a separate thread so that torch modes of the caller do not apply."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_measured, shape, sample).result()


def _measured(shape: Shape, sample: Sample) -> Choice:
    if shape.device.type != "cuda":
        return choose(forms(shape, sample), LIMITS[shape.dtype])
    with torch.cuda.device(shape.device):
        torch.cuda.synchronize()  # this thread has its own stream; nothing else may run during the timing
        return choose(forms(shape, sample), LIMITS[shape.dtype])


def choices() -> list[str]:
    """Return the choices of this process, one line per shape."""
    return [f"{shape}: {choice}" for shape, choice in _CHOICES.items()]


def forms(shape: Shape, sample: Sample) -> dict[str, Form]:
    """Build the kernels and torch's attention on the same random numbers, laid out as in a layer.

    Each sequence has four documents of different lengths. torch's default generators are not used.
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
    """Compare the results of all backends with `reference`, then the times of the correct ones."""
    plain = contenders[REFERENCE]
    expected = plain()
    device = expected[0].device
    distances: dict[str, float] = {}
    for name, form in contenders.items():
        if name == REFERENCE:
            continue
        distances[name] = max(_distance(a, b) for a, b in zip(form(), expected, strict=True))
        if not distances[name] <= limit:
            message = f"relative distance {distances[name]:.1e} from torch's results exceeds {limit:.0e}"
            warnings.warn(f"attention on {device} does not use {name}: {message}", stacklevel=2)
    del expected
    correct = {name: form for name, form in contenders.items() if distances.get(name, 0.0) <= limit}
    if len(correct) == 1:
        return Choice(REFERENCE, {}, distances)
    rounds = [{name: _milliseconds(form, device) for name, form in correct.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in correct}
    return Choice(min(medians, key=lambda name: medians[name]), medians, distances)


def _distance(a: Tensor, b: Tensor) -> float:
    distance = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(distance) else distance


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
