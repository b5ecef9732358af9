"""Products in bf16 on CPUs that have none: taken in fp32 and rounded once, which is what a bf16 product means.

torch leaves bf16 products to oneDNN where the CPU has AVX-512. Elsewhere, as on most laptops, it falls back to loops
that take up to a hundred times as long as the fp32 product. Key property: rounding is that of a product accumulated in
fp32, so a run in bf16 means the same on every CPU. Read next: `device.py`.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel


def slow_bf16() -> bool:
    """Whether torch has no bf16 products of its own on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen_bf16() -> Library:
    """Have `mm` and `bmm` of bf16 on the CPU go through fp32 in this process, as long as what is returned is kept."""
    library = Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():  # torch says that a kernel is replaced, which is what is wanted
        warnings.simplefilter("ignore")
        for name in ("mm", "bmm"):
            library.impl(name, _through_fp32(get_kernel(f"aten::{name}", "CPU")), with_keyset=True)
    return library


def _through_fp32(plain: Any) -> Any:
    """A kernel that widens bf16 operands, and otherwise is the plain one."""

    def product(keys: Any, one: Tensor, other: Tensor) -> Tensor:
        if one.dtype is not torch.bfloat16:
            same: Tensor = plain.call_boxed(keys, one, other)
            return same
        wide: Tensor = plain.call_boxed(keys, one.float(), other.float())
        return wide.bfloat16()

    return product
