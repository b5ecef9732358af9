"""Select the device of a rank: CUDA with NCCL, or the CPU with gloo.

megatron-core uses CUDA in several places: `torch.cuda.current_device()`, the literal "cuda" in tensor factories, and
names of tensor types. `present_cpu` replaces these by the CPU, so that the same megatron-core code runs under gloo. It
has no effect on a GPU.

CPUs without AVX-512 have no fast bf16 products: torch's fallback is up to a hundred times slower than fp32.
`widen_bf16` computes them in fp32 and rounds once, so that a bf16 run gives the same precision on every CPU.
"""

import ctypes
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

from megashear.engine.startup import uses_cuda


def slow_bf16() -> bool:
    """Return whether torch lacks fast bf16 products on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen_bf16() -> Library:
    """Compute `mm` and `bmm` of bf16 tensors on the CPU in fp32, for as long as the returned library is referenced."""
    library = Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():  # torch warns that a kernel is replaced, as intended
        warnings.simplefilter("ignore")
        for name in ("mm", "bmm"):
            library.impl(name, _through_fp32(get_kernel(f"aten::{name}", "CPU")), with_keyset=True)
    return library


def _through_fp32(original: Any) -> Any:
    """Return a kernel that widens bf16 operands and passes other dtypes to the original kernel."""

    def product(keys: Any, left: Tensor, right: Tensor) -> Tensor:
        if left.dtype is not torch.bfloat16:
            unchanged: Tensor = original.call_boxed(keys, left, right)
            return unchanged
        wide: Tensor = original.call_boxed(keys, left.float(), right.float())
        return wide.bfloat16()

    return product


logger = logging.getLogger(__name__)

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}

WIDENED_KERNELS: list[Library] = []
"""Replacements of torch's bf16 kernels, referenced until the process ends."""


def rank_device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend for the device."""
    return "nccl" if uses_cuda() else "gloo"


def device_name() -> str:
    """Return the product name of the device."""
    return torch.cuda.get_device_name() if uses_cuda() else "CPU"


def keep_freed_memory() -> None:
    """Keep freed memory in this process. Has no effect on a GPU or with a C library other than glibc.

    Every step allocates the same activations. By default glibc returns large blocks to the kernel, and each new
    allocation faults and zeroes its pages again: a tenth of a step's time on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not uses_cuda():
        mallopt(MALLOPT_MMAP_MAX, 0)
        mallopt(MALLOPT_TRIM_THRESHOLD, -1)


class _CpuCuda:
    """Replacement of `torch.cuda` in megatron-core: the current device is the CPU, and synchronize does nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        return None


class _CpuTorch:
    """Replacement of `torch` in megatron-core: tensor factories map the device "cuda" to the CPU."""

    cuda = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in FACTORIES:
            value = _on_cpu(value)
            setattr(self, name, value)
        return value


CPU_TORCH = _CpuTorch()


def present_cpu() -> None:
    """Make the megatron-core modules loaded so far run on the CPU. Idempotent; has no effect on a GPU.

    Only the name `torch` inside megatron-core's modules is replaced, so other libraries in the process are unaffected.
    Two tensor methods change globally: `type()` without an argument names fp32, bf16 and fp16 as on CUDA, and `cuda()`,
    which would raise without a GPU, returns the tensor itself. On CPUs without fast bf16 products, `widen_bf16` is
    applied.
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
            WIDENED_KERNELS.append(widen_bf16())
        logger.info("no GPU in use: computing on the CPU with the gloo backend")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that the device "cuda" means the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _cuda_type_names(original: Any) -> Any:
    """Wrap `Tensor.type()` so that it names dtypes as on CUDA. Conversions are unchanged."""

    @functools.wraps(original)
    def type_name(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and tensor.dtype in TYPE_NAMES:
            return TYPE_NAMES[tensor.dtype]
        return original(tensor, dtype, *args, **kwargs) if dtype is not None else original(tensor)

    return type_name
