"""The libraries that the build made from csrc/: which one serves a device, and how its kernels are launched.

`megashear._csrc` runs on the CPU, `megashear._csrc_cuda` on CUDA devices that it was compiled for. Where a library is
missing or a device cannot run it, the plain torch reference serves instead.
Read next: `swiglu.py`, the simplest op.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from megashear.errors import ConfigError

_LIBRARIES = {"cpu": "megashear._csrc", "cuda": "megashear._csrc_cuda"}
_DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}


@functools.cache
def _load(device_type: str) -> ModuleType | None:
    """The library for a type of device; None where the build left it out, with a warning where it cannot be loaded."""
    name = _LIBRARIES.get(device_type)
    if name is None or importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"{name} cannot be loaded, plain torch serves in its place: {error}", stacklevel=2)
        return None


@functools.cache
def _usable(device_type: str, index: int | None) -> ModuleType | None:
    """The library if its kernels run on this very device; asks a CUDA device once."""
    library = _load(device_type)
    if library is None or device_type == "cpu":
        return library
    with torch.cuda.device(index):
        problem = library.device_problem()
    if problem:
        warnings.warn(f"{library.__name__} does not run on cuda:{index}, plain torch serves: {problem}", stacklevel=2)
        return None
    return library


def library_for(device: torch.device) -> ModuleType | None:
    """The library whose kernels run on `device`, or None where the reference must serve.

    MEGASHEAR_KERNELS=reference in the environment makes that None everywhere. Raises ConfigError for another value.
    """
    wish = os.environ.get("MEGASHEAR_KERNELS", "")
    if wish == "reference":
        return None
    if wish:
        raise ConfigError(f"MEGASHEAR_KERNELS is {wish!r}: leave it unset, or set it to 'reference' for plain torch")
    return _usable(device.type, device.index)


def serves(x: Tensor) -> bool:
    """Whether compiled kernels take tensors of x's dtype on x's device."""
    return x.dtype in _DTYPES and library_for(x.device) is not None


def dtype_code(x: Tensor) -> int:
    """The number that stands for x's dtype in the kernels."""
    library = _load(x.device.type)
    assert library is not None
    return getattr(library, _DTYPES[x.dtype])


def address(x: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None."""
    assert x is None or x.is_contiguous()
    return 0 if x is None else x.data_ptr()


@contextmanager
def launching(x: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """The library for x's device and its executor: torch's number of threads, or the current stream of that device."""
    library = _load(x.device.type)
    assert library is not None, f"no kernels for {x.device}: ask serves() first"
    if x.device.type == "cpu":
        yield library, torch.get_num_threads()
    else:
        with torch.cuda.device(x.device):
            yield library, torch.cuda.current_stream().cuda_stream


def check_vector(name: str, vector: Tensor | None, length: int, device: torch.device) -> None:
    """Raise ValueError unless `vector` is None or a contiguous fp32 [length] on `device`, as kernels take it."""
    if vector is None:
        return
    if vector.shape != (length,) or vector.dtype != torch.float32 or vector.device != device:
        raise ValueError(f"{name} must be fp32 [{length}] on {device}, not {vector.dtype} {list(vector.shape)}")
