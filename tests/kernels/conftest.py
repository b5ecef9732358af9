"""Where kernels are tested: the CPU, a GPU where there is one, and CUDA sources run on the CPU without any."""

import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from megashear.ops.kernels import library
from megashear.ops.kernels.library import compiled_for

from .cuda_emulation import Controls, load_kernels

CPU = torch.device("cpu")

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def device(request) -> torch.device:
    device = torch.device(request.param, 0 if request.param == "cuda" else None)
    if not compiled_for(device):
        tools = {"cpu": ("c++", "g++", "clang++"), "cuda": ("nvcc",)}[device.type]
        if any(map(shutil.which, tools)):
            pytest.fail("the kernels are not built: run `pip install -e .` or `python setup.py build_ext --inplace`")
        pytest.skip(f"none of {tools} is here to build the kernels")
    return device


@pytest.fixture(scope="session")
def cuda_library() -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("g++, which compiles the CUDA kernels for the CPU, is not here")
    return load_kernels()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def cuda_device(request) -> torch.device:
    """Where the CUDA kernels run: the CPU, which emulates them, and a GPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return CPU
    device = torch.device("cuda", 0)
    if not compiled_for(device):
        pytest.fail("the CUDA kernels are not built, or not for this GPU: run `pip install -e .`")
    return device


@pytest.fixture
def emulated(cuda_library, monkeypatch) -> Iterator[Controls]:
    """Tensors on the CPU meet the CUDA kernels."""
    monkeypatch.setitem(library._LIBRARIES, "cpu", cuda_library)
    monkeypatch.setitem(library._RUNS_ON, CPU, True)
    controls = Controls(cuda_library.__file__)
    controls.descend(False)
    yield controls
    controls.descend(False)
