"""Compile the CUDA kernels of csrc/ with g++ and run them on the CPU.

The launch syntax and `__shared__` are rewritten. mma_warp.cuh and mma_warpgroup.cuh, which are inline PTX, are replaced
by the files of the same names in this folder. Everything else, bindings included, is the source that nvcc compiles.
machine.h describes how threads run and which errors are detected.
"""

import ctypes
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pybind11

from helpers.compiled import compiled

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"

LAUNCH = re.compile(r"(\b[A-Za-z_]\w*(?:<[^;{}<]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(16\) )?([\w ]+) (\w+)\[\];")
STATIC = re.compile(r"__shared__ ([\w<>, ]+?) (\w+)((?:\[[^\]]*\])*);")


def rewritten(source: str) -> str:
    """CUDA C++ as C++ for `cuda_runtime.h` beside this."""
    source = LAUNCH.sub(r"emulation::launch([&](auto... arguments) { \1(arguments...); }, \2)(", source)
    source = DYNAMIC.sub(r"\1* \2 = static_cast<\1*>(emulation::machine.dynamic_shared());", source)
    return STATIC.sub(r"static \1 \2\3; emulation::machine.shared(&\2, sizeof \2);", source)


FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"]


def compile_cuda(sources: list[Path], includes: list[Path], library: Path) -> None:
    """Compile `sources`, already rewritten, into a shared library. Raises AssertionError if g++ refuses them."""
    named = [*(f"-I{path}" for path in (HERE, *includes)), "-x", "c++", *map(str, sources), str(HERE / "controls.cpp")]
    done = subprocess.run(["g++", *FLAGS, "-DMEGASHEAR_CUDA", *named, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def library(name: str, build: Callable[[Path], None]) -> Path:
    """The shared library `name` that `build` compiles into a folder, from the cache if no source has changed."""
    inputs = [path for path in (*CSRC.rglob("*.*"), *HERE.glob("*.*")) if path.is_file()]
    return (
        compiled(f"emulated-{name}", "g++", [*FLAGS, sys.version, pybind11.__version__], inputs, build) / f"{name}.so"
    )


def rewrite_sources(folder: Path) -> None:
    """Write csrc's sources and headers to a folder as this machine compiles them."""
    for path in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cu*"), CSRC / "bindings.cpp"]:
        target = folder / path.relative_to(CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name in ("mma_warp.cuh", "mma_warpgroup.cuh"):
            target.write_text((HERE / path.name).read_text())
        else:
            text = path.read_text()
            target.write_text(rewritten(text) if path.suffix in (".cu", ".cuh") else text)


def compile_kernels(folder: Path) -> None:
    """Compile the module `_csrc_cuda` for addresses of the CPU's memory."""
    rewrite_sources(folder)
    sources = [folder / "bindings.cpp", *sorted(folder.glob("*.cu")), *sorted(folder.glob("*/cuda.cu"))]
    includes = [folder, Path(sysconfig.get_paths()["include"]), Path(pybind11.get_include())]
    compile_cuda(sources, includes, folder / "_csrc_cuda.so")


def load_kernels() -> ModuleType:
    """Import the module `_csrc_cuda`, compiled for the CPU."""
    library_path = library("_csrc_cuda", compile_kernels)
    spec = spec_from_file_location(
        "_csrc_cuda", library_path, loader=ExtensionFileLoader("_csrc_cuda", str(library_path))
    )
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Controls:
    """What tests ask of the machine that runs a built library."""

    def __init__(self, library: Path | str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_bank_conflicts.restype = ctypes.c_uint64

    def descend(self, wanted: bool) -> None:
        """Whether threads, warps and blocks run from the last to the first."""
        self._library.emulation_descend(int(wanted))

    def bank_conflicts(self) -> int:
        """Times so far that two rows that one ldmatrix reads at once lay in the same banks of shared memory."""
        return self._library.emulation_bank_conflicts()
