"""Where kernels are tested: the CPU always, a GPU where there is one. The kernels must have been built."""

import shutil

import pytest
import torch

from megashear.ops.kernels.library import compiled_for

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
