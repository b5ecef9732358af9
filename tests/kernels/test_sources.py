"""The kernel sources compile without a warning, for every device, and know no torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CUDA_SOURCES = sorted(CSRC.glob("**/*.cu"))
CPU_SOURCES = sorted(path for path in CSRC.glob("**/*.cpp") if path.name != "bindings.cpp")
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++") or shutil.which("clang++")


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr


def _name(path: Path) -> str:
    return str(path.relative_to(CSRC))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=_name)
def test_cuda_compiles_without_a_warning(source, tmp_path):
    architectures = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    flags = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", *architectures]
    _compile([NVCC, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")])


@pytest.mark.skipif(CXX is None, reason="no C++ compiler is here")
@pytest.mark.parametrize("source", CPU_SOURCES, ids=_name)
def test_cpu_compiles_without_a_warning(source, tmp_path):
    flags = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    _compile([CXX, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")])


def test_sources_know_no_torch_and_every_op_has_its_parts():
    for path in CSRC.rglob("*.*"):
        assert "#include <torch" not in path.read_text() and "#include <ATen" not in path.read_text(), path
    folders = [path for path in CSRC.iterdir() if path.is_dir()]
    assert len(folders) >= 3
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= {f"{folder.name}.h", "bindings.h", "cpu.cpp"}
