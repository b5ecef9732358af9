"""Load the libraries built from csrc/ and launch their kernels.

`megashear._csrc` runs on the CPU, `megashear._csrc_cuda` on the CUDA devices that it was compiled for. If a library is
missing or a device cannot run it, the reference in plain torch is used.
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
    """Load a library. Returns None if it was not built; warns if it cannot be loaded."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"{name} cannot be loaded, using plain torch instead: {error}", stacklevel=2)
        return None


_LIBRARIES = {"cpu": _load("megashear._csrc"), "cuda": _load("megashear._csrc_cuda")}
_RUNS_ON: dict[torch.device, bool] = {}  # cached per device in a plain dict, which torch.compile can trace


def _runs_on(device: torch.device) -> bool:
    """Return whether the device's library was built and its kernels run on this device."""
    library = _LIBRARIES.get(device.type)
    if library is None or device.type == "cpu":
        return library is not None
    with torch.cuda.device(device):
        problem = library.device_problem()
    if problem:
        warnings.warn(
            f"{library.__name__} does not run on {device}, using plain torch instead: {problem}", stacklevel=2
        )
    return not problem


_RUNS_ON[torch.device("cpu")] = _runs_on(torch.device("cpu"))


def compiled_for(device: torch.device) -> bool:
    """Return whether compiled kernels run on `device`; otherwise the reference must be used.

    MEGASHEAR_KERNELS=reference in the environment disables the kernels.

    Raises:
        ConfigError: If MEGASHEAR_KERNELS has another value.
    """
    value = os.environ.get("MEGASHEAR_KERNELS", "")
    if value == "reference":
        return False
    if value:
        raise ConfigError(f"MEGASHEAR_KERNELS is {value!r}: leave it unset, or set it to 'reference' for plain torch")
    if device not in _RUNS_ON:
        _RUNS_ON[device] = _runs_on(device)
    return _RUNS_ON[device]


def serves(x: Tensor) -> bool:
    """Whether compiled kernels take tensors of x's dtype on x's device."""
    return x.dtype in _DTYPES and compiled_for(x.device)


def dtype_code(x: Tensor) -> int:
    """Return the kernels' number of x's dtype."""
    code: int = getattr(_LIBRARIES[x.device.type], _DTYPES[x.dtype])
    return code


def address(x: Tensor | None) -> int:
    """Return the address of a contiguous tensor's first element, 0 for None."""
    assert x is None or x.is_contiguous()
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """Return x if its rows (last dimension) are contiguous with one constant stride, else a contiguous copy."""
    if x.dim() == 0 or x.numel() == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return x.contiguous()
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    inner = leading[1:]
    steady = all(outer[1] == size * stride for outer, (size, stride) in zip(leading, inner, strict=False))
    return x if steady else x.contiguous()


def matrix(x: Tensor | None) -> tuple[int, int]:
    """Return the address of a result of `rows` and its row stride in elements, (0, 0) for None."""
    if x is None:
        return 0, 0
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr(), strides[-1] if strides else x.shape[-1]


@contextmanager
def launching(x: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """Yield the library of x's device and its executor: torch's number of threads, or the current CUDA stream."""
    library = _LIBRARIES.get(x.device.type)
    assert library is not None, f"no kernels for {x.device}; check serves() first"
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
