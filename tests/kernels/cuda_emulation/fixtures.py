"""The CUDA kernels on the CPU, built once a session, in the place of the CPU's: `ops` then runs them."""

import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from megashear.ops.kernels import library

from . import Controls, build

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory) -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("g++, which compiles the CUDA kernels for the CPU, is not here")
    return build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def emulated(cuda_library, monkeypatch) -> Iterator[Controls]:
    """Tensors on the CPU meet the CUDA kernels."""
    monkeypatch.setitem(library._LIBRARIES, "cpu", cuda_library)
    monkeypatch.setitem(library._RUNS_ON, CPU, True)
    controls = Controls(cuda_library)
    controls.descend(False)
    yield controls
    controls.descend(False)
