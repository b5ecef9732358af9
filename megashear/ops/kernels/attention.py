"""Masked causal attention with a mask per head, as a custom op over csrc/masked_attention.

Inputs may have any strides. Results are laid out as [S, B, heads, d], which the output projection reads without a copy.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.ops.kernels.library import (
    _DTYPES,
    _LIBRARIES,
    address,
    check_vector,
    compiled_for,
    dtype_code,
    launching,
)

TILES = ""
"""Default kernel, one of the library's `masked_attention_tiles`; empty for the best."""


def _faster() -> bool:
    """Return whether this processor's kernels are faster than torch's scaled_dot_product_attention.

    torch's time / ours, forward and backward, [B, H, S, d] = [4, 8, 512, 64], [8, 10, 256, 32], [1, 8, 1024, 128], one
    Zen 4 core (tools/bench/attention.py; torch held to the same instruction set for AVX2):
        bf16  AVX512_BF16 4.1, 4.9, 2.7   AVX-512 2.5, 3.2, 1.5   AVX2 38, 12, 14
        fp32                              AVX-512 2.6, 2.2, 1.7   AVX2 2.4, 2.1, 1.5
    The kernel is used if vectors of 256 bits exist; narrower ones were not measured.
    """
    library = _LIBRARIES["cpu"]
    return library is not None and library.masked_attention_tiles(library.FLOAT32) != "portable"


_FASTER = _faster()  # evaluated once: equal machines choose alike and torch.compile sees a constant


def attention_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel supports the arguments and, on the CPU, is faster than torch's attention."""
    if not compiled_for(device):
        return False
    if device.type == "cpu":
        return _FASTER and dtype in (torch.float32, torch.bfloat16)
    library = _LIBRARIES[device.type]
    known = (torch.float32, torch.bfloat16, torch.float16)
    return library is not None and dtype in known and library.masked_attention_takes(head_dim)


def kernel_names(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the available kernels, best first. `plain`, the slowest, is listed only if no other exists."""
    library = _LIBRARIES[device.type]
    names = [] if library is None else library.masked_attention_tiles(getattr(library, _DTYPES[dtype])).split()
    return [name for name in names if name != "plain"] or names


@torch.library.custom_op("megashear::masked_attention", mutates_args=())
def masked_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    mask_H: Tensor | None,
    first_BS: Tensor | None,
    tiles: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, S, d] and each query's log-sum-exp, fp32 [B, H, S].

    q_BHSd: [B, H, S, d], fp32 or bf16, on CUDA also fp16; k_BGSd, v_BGSd: [B, G, S, d]; mask_H: fp32 [H]; first_BS:
    int32 [B, S]. tiles: one of `kernel_names`, empty for the best; the backward pass uses the same.
    """
    sizes = _sizes(q_BHSd, k_BGSd, v_BGSd, mask_H, first_BS)
    q, k, v = map(_readable, (q_BHSd, k_BGSd, v_BGSd))
    mask, first = _contiguous(mask_H), _contiguous(first_BS)
    out, lse = _tokens_first(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    with launching(q) as (library, executor):
        library.masked_attention_forward(
            _bound(q),
            _bound(k),
            _bound(v),
            address(mask),
            address(first),
            _bound(out),
            address(lse),
            sizes,
            dtype_code(q),
            tiles or TILES,
            executor,
        )
    return out, lse


@masked_attention.register_fake
def _(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    mask_H: Tensor | None,
    first_BS: Tensor | None,
    tiles: str = "",
) -> tuple[Tensor, Tensor]:
    return _tokens_first(q_BHSd), q_BHSd.new_empty(q_BHSd.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megashear::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    dout: Tensor,
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    mask_H: Tensor | None,
    first_BS: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tiles: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, in their shapes, and of the mask, fp32 [H] (empty without a mask)."""
    sizes = _sizes(q_BHSd, k_BGSd, v_BGSd, mask_H, first_BS)
    dout, q, k, v, out = map(_readable, (dout, q_BHSd, k_BGSd, v_BGSd, out))
    mask, first, lse = _contiguous(mask_H), _contiguous(first_BS), lse.contiguous()
    dq, dk, dv = map(_tokens_first, (q, k, v))
    dmask = None if mask is None else torch.empty_like(mask)
    with launching(q) as (library, executor):
        scratch = lse.new_empty(library.masked_attention_scratch(sizes))
        library.masked_attention_backward(
            _bound(dout),
            _bound(q),
            _bound(k),
            _bound(v),
            address(mask),
            address(first),
            _bound(out),
            address(lse),
            _bound(dq),
            _bound(dk),
            _bound(dv),
            address(dmask),
            address(scratch),
            sizes,
            dtype_code(q),
            tiles or TILES,
            executor,
        )
    return dq, dk, dv, lse.new_empty(0) if dmask is None else dmask


@masked_attention_backward.register_fake
def _(
    dout: Tensor,
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    mask_H: Tensor | None,
    first_BS: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tiles: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = lse.new_empty(0 if mask_H is None else mask_H.shape[0])
    return _tokens_first(q_BHSd), _tokens_first(k_BGSd), _tokens_first(v_BGSd), dmask


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, mask_H: Tensor | None, first_BS: Tensor | None
) -> tuple[int, int, int, int, int]:
    """Return sequences, heads, groups, tokens and head size; raise ValueError if shapes or dtypes do not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q, k, v must be [B, H, S, d], [B, G, S, d] twice, not {[list(x.shape) for x in (q, k, v)]}")
    batch, heads, tokens, head_dim = q.shape
    groups = k.shape[1]
    if k.shape != (batch, groups, tokens, head_dim) or (heads % groups if groups else heads):
        raise ValueError(f"keys must be [{batch}, a divisor of {heads}, {tokens}, {head_dim}], not {list(k.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must be of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    check_vector("the head mask", mask_H, heads, q.device)
    if first_BS is not None and (first_BS.shape != (batch, tokens) or first_BS.dtype != torch.int32):
        raise ValueError(f"first must be int32 [{batch}, {tokens}], not {first_BS.dtype} {list(first_BS.shape)}")
    return batch, heads, groups, tokens, head_dim


def _tokens_first(x: Tensor) -> Tensor:
    """Allocate x's shape [B, H, S, d], laid out as [S, B, H, d]."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(tokens, batch, heads, head_dim).permute(1, 2, 0, 3)


def _readable(x: Tensor) -> Tensor:
    """Return x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _bound(x: Tensor) -> tuple[int, int, int, int]:
    """Return the address and strides of a tensor [B, H, S, d] for the kernels."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, str], output: tuple[Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(output[1])
    *tensors, ctx.tiles = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
    q, k, v, mask_H, first_BS, out, lse = ctx.saved_tensors
    dq, dk, dv, dmask = masked_attention_backward(dout, q, k, v, mask_H, first_BS, out, lse, ctx.tiles)
    return dq, dk, dv, None if mask_H is None else dmask, None, None


masked_attention.register_autograd(_backward, setup_context=_save)
