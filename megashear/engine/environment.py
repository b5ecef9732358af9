"""What a run here would stand on: versions, devices, the backends of the engine and the kernels in use.

One table, which `megashear env` prints. Read next: `device.py`, `ops/kernels/library.py`.
"""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from megashear import __version__
from megashear.engine.device import backend, device_name, uses_cuda

PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "tokenizers", "sentencepiece", "lm_eval")


def describe() -> list[tuple[str, str]]:
    """(what, value) rows, in the order in which they are printed."""
    rows = [("megashear", __version__), ("Python", platform.python_version()), ("system", platform.platform())]
    rows += [(name, installed(name)) for name in PACKAGES]
    rows += [("CUDA of torch", torch.version.cuda or "none: a build for CPUs"), ("device", describe_device())]
    rows += [("threads per rank", str(torch.get_num_threads())), ("torch.distributed", backend())]
    rows += [("Transformer Engine", installed("transformer_engine")), ("Apex", apex())]
    return rows


def installed(name: str) -> str:
    """A package's version, or that it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def apex() -> str:
    """Whether NVIDIA's Apex is there: another project has that name on the package index, so its modules decide."""
    if importlib.util.find_spec("amp_C") is not None:
        return "installed"
    return "not installed"


def describe_device() -> str:
    """The devices on which ranks would compute."""
    if not uses_cuda():
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.device_count()} x {device_name()}, {memory:.0f} GiB"
