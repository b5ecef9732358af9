"""Products in bf16 on CPUs that have none: taken in fp32 and rounded once, which is what a bf16 product means.

torch leaves bf16 products to oneDNN where the CPU has AVX-512. Elsewhere, as on most laptops, it falls back to loops
that take up to a hundred times as long as the fp32 product. Key property: rounding is that of a product accumulated in
fp32, so a run in bf16 means the same on every CPU. Read next: `device.py`.

The device of a rank: CUDA with NCCL, or the CPU with gloo, presented to megatron-core in CUDA's stead.

megatron-core asks for CUDA in places: `torch.cuda.current_device()`, the literal "cuda" in tensor factories, and
names of tensor types. `present_cpu` answers these with the CPU, so that the very same megatron-core code runs under
gloo. It acts only when no GPU is in use, and says so in the log.
"""

import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel


def slow_bf16() -> bool:
    """Whether torch has no bf16 products of its own on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen_bf16() -> Library:
    """Have `mm` and `bmm` of bf16 on the CPU go through fp32 in this process, as long as what is returned is kept."""
    library = Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():  # torch says that a kernel is replaced, which is what is wanted
        warnings.simplefilter("ignore")
        for name in ("mm", "bmm"):
            library.impl(name, _through_fp32(get_kernel(f"aten::{name}", "CPU")), with_keyset=True)
    return library


def _through_fp32(plain: Any) -> Any:
    """A kernel that widens bf16 operands, and otherwise is the plain one."""

    def product(keys: Any, one: Tensor, other: Tensor) -> Tensor:
        if one.dtype is not torch.bfloat16:
            same: Tensor = plain.call_boxed(keys, one, other)
            return same
        wide: Tensor = plain.call_boxed(keys, one.float(), other.float())
        return wide.bfloat16()

    return product


logger = logging.getLogger(__name__)

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt
TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}

KEPT: list[Library] = []
"""Kernels that stand in for torch's, for as long as the process lives."""


def uses_cuda() -> bool:
    """Whether ranks compute on GPUs: CUDA is there and MEGASHEAR_DEVICE is not `cpu`."""
    return os.environ.get("MEGASHEAR_DEVICE", "") != "cpu" and torch.cuda.is_available()


def rank_device() -> torch.device:
    """The device on which this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def backend() -> str:
    """torch.distributed's backend for that device."""
    return "nccl" if uses_cuda() else "gloo"


def device_name() -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name() if uses_cuda() else "CPU"


def keep_freed_memory() -> None:
    """Have freed memory stay with this process; does nothing on a GPU, or where the C library is not glibc.

    Every step allocates the same activations. By default glibc gives large ones back to the kernel each time, and takes
    them anew page by page, each zeroed at a fault: a tenth of a step's time on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not uses_cuda():
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


class _CpuCuda:
    """`torch.cuda` for megatron-core on the CPU: the current device is the CPU, and there is nothing to wait for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        return None


class _CpuTorch:
    """`torch` for megatron-core on the CPU: tensor factories take the device "cuda" for the CPU."""

    cuda = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in FACTORIES:
            value = _on_cpu(value)
            setattr(self, name, value)
        return value


CPU_TORCH = _CpuTorch()


def present_cpu() -> None:
    """Let the megatron-core modules loaded so far run on the CPU; does nothing on a GPU, and nothing the second time.

    Only the name `torch` inside megatron-core's modules is exchanged, so that other libraries in the process see
    torch as it is. Two methods of all tensors change: `type()` without an argument names fp32, bf16 and fp16 as on
    CUDA, and `cuda()`, which would raise without a GPU, gives the tensor itself. On CPUs without products in bf16 these
    go through fp32.
    """
    if uses_cuda():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = CPU_TORCH  # type: ignore[attr-defined]
    if not hasattr(torch.Tensor.type, "__wrapped__"):
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
        torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign]
        if slow_bf16():
            KEPT.append(widen_bf16())
        logger.info("no GPU in use: megatron-core computes on the CPU, ranks talk through gloo")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that takes "cuda" for the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _cuda_type_names(original: Any) -> Any:
    """`Tensor.type()` that names dtypes as on CUDA; conversions are untouched."""

    @functools.wraps(original)
    def type_name(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and tensor.dtype in TYPE_NAMES:
            return TYPE_NAMES[tensor.dtype]
        return original(tensor, dtype, *args, **kwargs) if dtype is not None else original(tensor)

    return type_name
