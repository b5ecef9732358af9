"""csrc/'s CUDA kernels as a library for the CPU: their very sources, compiled by g++ against the headers beside this.

The launch syntax and __shared__ are rewritten, and csrc's mma.cuh and wgmma.cuh (all inline PTX) give way to those
here; nothing else differs from what nvcc sees, down to the bindings. Read next: machine.h (how threads run, what is
checked).
"""

import ctypes
import re
import subprocess
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pybind11

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


def compile_cuda(sources: list[Path], includes: list[Path], library: Path) -> None:
    """Compile `sources`, rewritten before, into a shared library; an AssertionError where g++ refuses them."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"]
    named = [*(f"-I{path}" for path in (HERE, *includes)), "-x", "c++", *map(str, sources), str(HERE / "controls.cpp")]
    done = subprocess.run(["g++", *flags, "-DMEGASHEAR_CUDA", *named, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(folder: Path, csrc: Path = CSRC) -> ModuleType:
    """The module `_csrc_cuda` of `csrc`, for addresses of the CPU's memory."""
    for path in [*csrc.rglob("*.h"), *csrc.rglob("*.cu*"), csrc / "bindings.cpp"]:
        target = folder / path.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name in ("mma.cuh", "wgmma.cuh"):
            target.write_text((HERE / path.name).read_text())
        else:
            text = path.read_text()
            target.write_text(rewritten(text) if path.suffix in (".cu", ".cuh") else text)
    library = folder / "_csrc_cuda.so"
    sources = [folder / "bindings.cpp", *sorted(folder.glob("*.cu")), *sorted(folder.glob("*/cuda.cu"))]
    includes = [folder, Path(sysconfig.get_paths()["include"]), Path(pybind11.get_include())]
    compile_cuda(sources, includes, library)
    spec = spec_from_file_location("_csrc_cuda", library, loader=ExtensionFileLoader("_csrc_cuda", str(library)))
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
