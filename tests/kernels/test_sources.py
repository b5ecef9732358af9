"""What the compilers say of the kernel sources: no warning, no spilled register, 16 bytes at a time; and no torch."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.compiled import build_script

CSRC = Path(__file__).parents[2] / "csrc"
CUDA_SOURCES = sorted(CSRC.glob("**/*.cu"))
CPU_SOURCES = sorted(path for path in CSRC.glob("**/*.cpp") if path.name != "bindings.cpp")
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++") or shutil.which("clang++")
WIDE = re.compile(r"(?:fLi4|Float16ELi8)E")  # in a kernel's mangled name: packs of 16 bytes
TILES = re.compile(r"(Warp|Warpgroup)TilesI\w*?Float16ELi(\d+)E")  # the same: tiles of a head size, for tensor cores
INSTRUCTIONS = {
    "Warp": (r"ldmatrix\S*x4\.shared", r"ldmatrix\S*\.trans\.shared"),
    "Warpgroup": (r"fence\.proxy\.async\.shared::cta", r"wgmma\.fence", r"wgmma\.commit_group", r"wgmma\.wait_group"),
}
PRODUCTS = {
    "Warp": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)",
    "Warpgroup": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(\w+)",
}


class Compiled(NamedTuple):
    """One CUDA source for all architectures: what ptxas printed, and the PTX of each architecture."""

    log: str
    ptx: list[str]


def _name(path: Path) -> str:
    return str(path.relative_to(CSRC))


def compile_source(library: str, source: Path) -> Path:
    """The folder with the compiler's log of a source, and its PTX: the installation's, if the source is unchanged."""
    build = build_script()
    command, _ = build.COMMANDS[library]()
    return build.compile_source(library, command, source)


@pytest.fixture(scope="session", params=CUDA_SOURCES, ids=_name)
def compiled(request) -> Compiled:
    if NVCC is None:
        pytest.skip("nvcc is not here")
    folder = compile_source("megashear._csrc_cuda", request.param)
    return Compiled((folder / "log.txt").read_text(), [path.read_text() for path in sorted(folder.glob("*.ptx"))])


def test_cuda_compiles_without_warnings(compiled):
    assert "warning" not in compiled.log
    assert len(compiled.ptx) == 2 and "sm_80" in compiled.log and "sm_90a" in compiled.log


def test_no_register_is_spilled(compiled):
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    assert len(spills) == compiled.log.count("Compiling entry function") > 0
    assert set(spills) == {("0", "0", "0")}


def test_kernels_of_packs_move_16_bytes_at_a_time(compiled, request):
    folder, reading, storing = request.node.callspec.params["compiled"].parent.name, 0, 0
    for ptx in compiled.ptx:
        for kernel in re.split(r"(?=\.entry )", ptx)[1:]:
            if WIDE.search(kernel.partition("(")[0]) is None:
                continue
            accesses = re.findall(r"\b(ld|st)\.global[.\w]*?(\.v4)?\.[bfu](16|32)\b", kernel)
            assert ("ld", ".v4", "32") in accesses
            single = [verb for verb, _, bits in accesses if bits == "16"]
            assert len(single) <= (folder == "cross_entropy"), "an element of 2 bytes is moved on its own"
            reading, storing = reading + 1, storing + (("st", ".v4", "32") in accesses)
    few = ("cross_entropy", "masked_attention")  # write one or two numbers a row; the first picks the label's logit
    assert (reading > 0) == (folder in ("masked_rms_norm", "masked_swiglu", "rope", *few))
    assert storing == reading or folder in few


def test_attention_uses_tensor_cores_and_async_copies(compiled, request):
    if request.node.callspec.params["compiled"].parent.name != "masked_attention":
        pytest.skip("not attention's")
    for ptx in compiled.ptx:
        count = {"Warp": 0, "Warpgroup": 0}
        for kernel in re.split(r"(?=\.entry )", ptx)[1:]:
            tiles = TILES.search(kernel.partition("(")[0])
            if tiles is None or (tiles[1] == "Warpgroup" and ".target sm_90a" not in ptx):
                assert tiles is None or re.search(r"\btrap;", kernel)  # elsewhere these kernels are never launched
                continue
            count[tiles[1]] += 1
            products = re.findall(PRODUCTS[tiles[1]], kernel)
            assert set(products) == {"bf16" if "8BFloat16" in kernel.partition("(")[0] else "f16"}
            for instruction in (*INSTRUCTIONS[tiles[1]], r"cp\.async\.cg\S*.*16,"):
                assert re.search(instruction, kernel), instruction
            assert re.search(r"st\.global\S*\.v4\.[bu]32", kernel)
        kernels = 3 * 2  # passes, dtypes
        assert count == {"Warp": 3 * kernels, "Warpgroup": 5 * kernels if ".target sm_90a" in ptx else 0}


@pytest.mark.medium
@pytest.mark.skipif(CXX is None, reason="no C++ compiler is here")
@pytest.mark.parametrize("source", CPU_SOURCES, ids=_name)
def test_cpu_compiles_without_a_warning(source):
    folder = compile_source("megashear._csrc", source)
    assert (folder / "log.txt").read_text() == ""


def test_sources_use_no_torch_and_ops_are_complete():
    for path in CSRC.rglob("*.*"):
        assert "#include <torch" not in path.read_text() and "#include <ATen" not in path.read_text(), path
    folders = [path for path in CSRC.iterdir() if path.is_dir()]
    assert len(folders) >= 3
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= {f"{folder.name}.h", "bindings.h", "cpu.cpp"}
