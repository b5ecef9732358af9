"""The machine that runs CUDA kernels on the CPU: what it is there to show, it shows; and right kernels are let be."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from .cuda_emulation import CSRC, HERE, Controls, compile_cuda, library, rewritten

pytestmark = pytest.mark.medium  # compiles

FAULTS = ["pass", "copy", "diverging", "ended", "rows", "misaligned", "greedy", "fragments", "matrices"]

GIVEN = torch.cat((torch.arange(256.0), torch.arange(128.0) % 7 - 3))


@pytest.fixture(scope="module")
def faults() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++, which compiles the CUDA kernels for the CPU, is not here")

    def build(folder: Path) -> None:
        source = folder / "faults.cu"
        source.write_text(rewritten((HERE / "faults.cu").read_text()))
        compile_cuda([source], [CSRC], folder / "faults.so")

    return library("faults", build)


def _run(kernels: Path, name: str, right: bool) -> tuple[torch.Tensor, str]:
    """What the kernel wrote, fp32 [256], and the problem that the launch had."""
    run = ctypes.CDLL(str(kernels)).run_fault
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool]
    given, out = GIVEN, torch.zeros(256)
    problem = run(FAULTS.index(name), given.data_ptr(), out.data_ptr(), right)
    return out, problem.decode()


@pytest.mark.parametrize("name", FAULTS)
def test_right_kernels_run(faults, name):
    conflicts = Controls(faults).bank_conflicts()
    out, problem = _run(faults, name, right=True)
    assert problem == "" and out.isfinite().all()
    assert Controls(faults).bank_conflicts() == conflicts
    if name in ("pass", "copy"):
        count = 64 if name == "pass" else 256
        assert out[:count].tolist() == list(range(count - 1, -1, -1))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", ["pass", "copy"])
def test_a_missing_barrier_or_wait_shows_as_nan(faults, name, descending):
    Controls(faults).descend(descending)
    try:
        out, problem = _run(faults, name, right=False)
    finally:
        Controls(faults).descend(False)
    assert problem == "" and out.isnan().any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diverging", r"different places: (24|40) at barrier faults.cu:\d+, (24|40) at barrier"),
        ("ended", r"deadlock: 48 at ended, 16 at warp faults.cu:\d+"),
        ("misaligned", "misaligned address: ldmatrix"),
        ("greedy", "too much shared memory"),
    ],
)
def test_deadlocks_and_faults_are_reported(faults, name, message):
    _, problem = _run(faults, name, right=False)
    assert re.search(message, problem), problem
    assert _run(faults, name, right=True)[1] == ""  # and the next launch starts afresh


def test_bank_conflicts_are_counted(faults):
    before = Controls(faults).bank_conflicts()
    _run(faults, "rows", right=False)
    assert Controls(faults).bank_conflicts() - before == 2 * 4 * 7  # two warps, four matrices, seven rows too many


def test_fragments_follow_the_isa(faults):
    a, b = GIVEN[:256].view(16, 16), GIVEN[256:].view(16, 8)
    for right, left in ((True, a), (False, a.flip(1))):
        out, problem = _run(faults, "fragments", right)
        assert problem == "" and torch.equal(out[:128].view(16, 8), left @ b)


def test_matrices_are_read_by_rows_or_transposed(faults):
    matrices = torch.arange(256.0).view(4, 8, 8)
    for plain, expected in ((True, matrices), (False, matrices.mT)):
        out, problem = _run(faults, "matrices", plain)
        assert problem == "" and torch.equal(out.view(4, 8, 8), expected)
