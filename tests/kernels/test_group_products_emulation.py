"""The machine's warpgroup products: descriptors and fragments as the PTX ISA has them; mistakes show, which on a GPU
might not.
"""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from .cuda_emulation import HERE, Controls, compile_cuda, rewrite_sources, rewritten
from .cuda_emulation import library as cached_library

pytestmark = pytest.mark.medium  # compiles

MISTAKES = ["none", "not shown", "not waited", "not fenced", "stride", "leading", "not aligned", "warps differ"]
MISTAKES += ["overwritten"]
WIDTHS = [48, 96, 128]
"""Head sizes: blocks of 16, 32 and 64 columns."""


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++, which compiles the CUDA kernels for the CPU, is not here")

    def build(folder: Path) -> None:
        rewrite_sources(folder)
        source = folder / "group_products.cu"
        source.write_text(rewritten((HERE / "group_products.cu").read_text()))
        compile_cuda([source], [folder], folder / "group_products.so")

    return cached_library("group_products", build)


def _run(library: Path, width: int, mistake: str) -> tuple[torch.Tensor, torch.Tensor, bool, str]:
    """Both products, whether they are right to fp32's and bf16's roundings, and the problem that the launch had."""
    run = ctypes.CDLL(str(library)).run_products
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4, ctypes.c_int]
    generator = torch.Generator().manual_seed(width)
    left, right = (torch.randn(64, width, generator=generator).bfloat16().float() for _ in range(2))
    out, more = torch.zeros(64, 64), torch.zeros(64, width)
    pointers = (left.data_ptr(), right.data_ptr(), out.data_ptr(), more.data_ptr())
    problem = run(width, *pointers, MISTAKES.index(mistake)).decode()
    exact = left.double() @ right.double().mT
    right_out = torch.allclose(out.double(), exact, rtol=0, atol=1e-4)
    of_more = out.bfloat16().double() @ right.double()
    return out, more, right_out and torch.allclose(more.double(), of_more, rtol=0, atol=1e-2), problem


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_products_are_right(library, width, descending):
    Controls(library).descend(descending)
    try:
        _, _, right, problem = _run(library, width, "none")
    finally:
        Controls(library).descend(False)
    assert problem == "" and right


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("not shown", "wgmma reads what was written without fence.proxy.async"),
        ("not fenced", "no wgmma.fence before the first product"),
        ("not aligned", "a tile that is not aligned"),
        ("warps differ", "the warps of a group begin different|deadlock"),
    ],
)
def test_undefined_results_are_reported(library, width, mistake, message):
    problem = _run(library, width, mistake)[3]
    assert re.search(message, problem), problem
    assert _run(library, width, "none")[2:] == (True, "")  # and the next launch starts afresh


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_nan_until_the_wait(library, width):
    out, _, right, problem = _run(library, width, "not waited")
    assert problem == "" and not right and out.isnan().all()


@pytest.mark.parametrize("mistake", ["stride", "leading", "overwritten"])
@pytest.mark.parametrize("width", WIDTHS)
def test_wrong_strides_and_early_writes_change_products(library, width, mistake):
    _, _, right, problem = _run(library, width, mistake)
    assert not right or problem


def _address(library: Path, descriptor: int, rows: bool, index: int, k: int) -> int:
    find = ctypes.CDLL(str(library)).element_address
    find.restype = ctypes.c_uint
    find.argtypes = [ctypes.c_uint64, ctypes.c_bool, ctypes.c_uint, ctypes.c_uint]
    return find(descriptor, rows, index, k)


@pytest.mark.parametrize(("mode", "chunks"), [(0, 1), (3, 2), (2, 4), (1, 8)])
def test_descriptors_are_read_as_the_canonical_layouts(library, mode, chunks):
    """In units of 16 bytes (T = 8 elements), c = `chunks` of them to a row, before bits are crossed:

    K-major [(8, m), (T, 2)]: strides (c, SBO), (-, 1), without crossing (1, SBO), (-, LBO)
    MN-major [(T, c, m), (8, k)]: strides (-, 1, LBO), (c, SBO), without crossing (-, -, SBO), (1, LBO)
    and then bits 4, 5, 6 of the address are crossed with bits 7, 8, 9: as many as 2^bits = c.
    """
    start, leading, stride = 4096, 3 * 1024, 2 * 1024
    descriptor = start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62

    def crossed(address: int) -> int:
        return address ^ (address >> 7) % chunks << 4

    for index in range(64):
        for k in range(16):
            along = 16 if mode else leading
            expected = crossed(start + index % 8 * 16 * chunks + index // 8 * stride + k // 8 * along) + k % 8 * 2
            assert _address(library, descriptor, False, index, k) == expected
            block, by_k = (leading, stride) if mode else (stride, leading)
            inside = index // 8 % chunks * 16 + index // (8 * chunks) * block
            expected = crossed(start + inside + k % 8 * 16 * chunks + k // 8 * by_k) + index % 8 * 2
            assert _address(library, descriptor, True, index, k) == expected
