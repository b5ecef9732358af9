"""Split of the fused QKV product and RoPE as one custom op over csrc/rope, one pass forward and one backward.

The values are copied so that the product's memory is freed after the split. A view would keep all of it alive for the
third that attention saves.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.ops.kernels.library import dtype_code, launching


@torch.library.custom_op("megashear::rope_qkv", mutates_args=())
def rope_qkv(qkv_SBR: Tensor, groups: int, queries: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values, [S, B, heads, d]. cos, sin: fp32 [positions, d / 2]."""
    sizes = _sizes(qkv_SBR, groups, queries, cos, sin)
    positions, batch, _, _, half = sizes
    fused = _heads(qkv_SBR.unflatten(2, (groups * (queries + 2), 2 * half)))
    q, k, v = (qkv_SBR.new_empty(positions, batch, heads, 2 * half) for heads in (groups * queries, groups, groups))
    cos, sin = cos.contiguous(), sin.contiguous()
    with launching(qkv_SBR) as (library, executor):
        library.rope_qkv_forward(
            _rows(fused),
            cos.data_ptr(),
            sin.data_ptr(),
            _rows(q),
            _rows(k),
            _rows(v),
            sizes,
            dtype_code(qkv_SBR),
            executor,
        )
    return q, k, v


@rope_qkv.register_fake
def _(qkv_SBR: Tensor, groups: int, queries: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positions, batch, _ = qkv_SBR.shape
    width = 2 * cos.shape[-1]
    q, k, v = (qkv_SBR.new_empty(positions, batch, heads, width) for heads in (groups * queries, groups, groups))
    return q, k, v


@torch.library.custom_op("megashear::rope_qkv_backward", mutates_args=())
def rope_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of the product [S, B, R] from those of its parts [S, B, heads, d]."""
    positions, batch, groups, width = dk.shape
    queries = dq.shape[2] // groups if groups else 0
    sizes = (positions, batch, groups, queries, width // 2)
    dqkv = dq.new_empty(positions, batch, groups * (queries + 2), width)
    dq, dk, dv = _heads(dq), _heads(dk), _heads(dv)
    cos, sin = cos.contiguous(), sin.contiguous()
    with launching(dq) as (library, executor):
        library.rope_qkv_backward(
            _rows(dq),
            _rows(dk),
            _rows(dv),
            cos.data_ptr(),
            sin.data_ptr(),
            _rows(dqkv),
            sizes,
            dtype_code(dq),
            executor,
        )
    return dqkv.flatten(2)


@rope_qkv_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(*dq.shape[:2], (dq.shape[2] + 2 * dk.shape[2]) * dq.shape[3])


def _sizes(qkv_SBR: Tensor, groups: int, queries: int, cos: Tensor, sin: Tensor) -> tuple[int, int, int, int, int]:
    """Return positions, sequences, groups, queries per group and half the head size; raise ValueError if unfit."""
    if cos.dim() != 2 or sin.shape != cos.shape or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be fp32 [positions, head_dim / 2], not {cos.dtype} {list(cos.shape)}")
    half = cos.shape[1]
    rows = groups * (queries + 2) * 2 * half
    if qkv_SBR.dim() != 3 or qkv_SBR.shape[2] != rows or rows >= 2**32:
        raise ValueError(f"the QKV product must be [positions, batch, {rows}], not {list(qkv_SBR.shape)}")
    positions, batch, _ = qkv_SBR.shape
    if positions > len(cos) or cos.device != qkv_SBR.device or sin.device != qkv_SBR.device:
        raise ValueError(f"cos and sin must cover {positions} positions on {qkv_SBR.device}, not {len(cos)}")
    return positions, batch, groups, queries, half


def _heads(x_SBHd: Tensor) -> Tensor:
    """Return x if its last dimension is contiguous, else a contiguous copy."""
    return x_SBHd if x_SBHd.stride(-1) == 1 else x_SBHd.contiguous()


def _rows(x_SBHd: Tensor) -> tuple[int, int, int, int]:
    return x_SBHd.data_ptr(), x_SBHd.stride(0), x_SBHd.stride(1), x_SBHd.stride(2)


def _save(ctx: Any, inputs: tuple[Tensor, int, int, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[3:])


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None]:
    return rope_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


rope_qkv.register_autograd(_backward, setup_context=_save)
