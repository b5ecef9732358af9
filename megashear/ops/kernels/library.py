"""The libraries that the build made from csrc/: which one serves a device, and how its kernels are launched.

`megashear._csrc` runs on the CPU, `megashear._csrc_cuda` on CUDA devices that it was compiled for. Where a library is
missing or a device cannot run it, the plain torch reference serves instead.
Read next: `swiglu.py`, the simplest op.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from megashear.errors import ConfigError

_DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


def _load(name: str) -> ModuleType | None:
    """A library that the build made; None where it was left out, with a warning where it cannot be loaded."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"{name} cannot be loaded, plain torch serves in its place: {error}", stacklevel=2)
        return None


_LIBRARIES = {"cpu": _load("megashear._csrc"), "cuda": _load("megashear._csrc_cuda")}
_RUNS_ON: dict[torch.device, bool] = {}  # asked once per device; a plain dict, which torch.compile sees through


def _runs_on(device: torch.device) -> bool:
    """Whether the device's library was built and its kernels run on this very device."""
    library = _LIBRARIES.get(device.type)
    if library is None or device.type == "cpu":
        return library is not None
    with torch.cuda.device(device):
        problem = library.device_problem()
    if problem:
        warnings.warn(f"{library.__name__} does not run on {device}, plain torch serves: {problem}", stacklevel=2)
    return not problem


_RUNS_ON[torch.device("cpu")] = _runs_on(torch.device("cpu"))


def compiled_for(device: torch.device) -> bool:
    """Whether compiled kernels run on `device`; else the reference must serve.

    MEGASHEAR_KERNELS=reference in the environment makes that False everywhere. Raises ConfigError for another value.
    """
    wish = os.environ.get("MEGASHEAR_KERNELS", "")
    if wish == "reference":
        return False
    if wish:
        raise ConfigError(f"MEGASHEAR_KERNELS is {wish!r}: leave it unset, or set it to 'reference' for plain torch")
    if device not in _RUNS_ON:
        _RUNS_ON[device] = _runs_on(device)
    return _RUNS_ON[device]


def serves(x: Tensor) -> bool:
    """Whether compiled kernels take tensors of x's dtype on x's device."""
    return x.dtype in _DTYPES and compiled_for(x.device)


def dtype_code(x: Tensor) -> int:
    """The number that stands for x's dtype in the kernels."""
    code: int = getattr(_LIBRARIES[x.device.type], _DTYPES[x.dtype])
    return code


def address(x: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None."""
    assert x is None or x.is_contiguous()
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """x itself where its rows (last dimension) are contiguous and one constant stride apart, else a contiguous copy."""
    if x.dim() == 0 or x.numel() == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return x.contiguous()
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    inner = leading[1:]
    steady = all(outer[1] == size * stride for outer, (size, stride) in zip(leading, inner, strict=False))
    return x if steady else x.contiguous()


def matrix(x: Tensor | None) -> tuple[int, int]:
    """The address of what `rows` gave, and the stride of its rows in elements; (0, 0) for None."""
    if x is None:
        return 0, 0
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr(), strides[-1] if strides else x.shape[-1]


@contextmanager
def launching(x: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """The library for x's device and its executor: torch's number of threads, or the current stream of that device."""
    library = _LIBRARIES.get(x.device.type)
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
