"""Masked SwiGLU as a custom op over csrc/masked_swiglu. Gate and up are one matrix, and so is their gradient.

The mask's gradient is summed over tokens in a fixed order, so equal inputs give equal bits on any number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.ops.kernels.library import address, check_vector, dtype_code, launching, matrix, rows


@torch.library.custom_op("megashear::masked_swiglu", mutates_args=())
def masked_swiglu(gate_up: Tensor, mask_F: Tensor | None) -> Tensor:
    """Return silu(gate) * up * mask, [.., F]. gate_up: [.., 2F] of fp32, bf16 or fp16; mask_F: fp32 [F] or None."""
    tokens, features = _sizes(gate_up, mask_F)
    gate_up, mask_F = rows(gate_up), _contiguous(mask_F)
    out = gate_up.new_empty(*gate_up.shape[:-1], features)
    with launching(gate_up) as (library, executor):
        library.masked_swiglu_forward(
            matrix(gate_up), address(mask_F), address(out), tokens, features, dtype_code(gate_up), executor
        )
    return out


@masked_swiglu.register_fake
def _(gate_up: Tensor, mask_F: Tensor | None) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megashear::masked_swiglu_backward", mutates_args=())
def masked_swiglu_backward(dout: Tensor, gate_up: Tensor, mask_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate_up and of the mask, fp32 [F] (empty without a mask). dout: [.., F]."""
    tokens, features = _sizes(gate_up, mask_F)
    dout, gate_up, mask_F = rows(dout), rows(gate_up), _contiguous(mask_F)
    dgate_up = gate_up.new_empty(gate_up.shape)
    masked = mask_F is not None
    with launching(gate_up) as (library, executor):
        dmask_F = gate_up.new_empty(features if masked else 0, dtype=torch.float32)
        partial = gate_up.new_empty(library.strip_count(tokens) if masked else 0, features, dtype=torch.float32)
        library.masked_swiglu_backward(
            matrix(dout),
            matrix(gate_up),
            address(mask_F),
            address(dgate_up),
            address(dmask_F),
            address(partial),
            tokens,
            features,
            dtype_code(gate_up),
            executor,
        )
    return dgate_up, dmask_F


@masked_swiglu_backward.register_fake
def _(dout: Tensor, gate_up: Tensor, mask_F: Tensor | None) -> tuple[Tensor, Tensor]:
    dmask_F = gate_up.new_empty(0 if mask_F is None else gate_up.shape[-1] // 2, dtype=torch.float32)
    return gate_up.new_empty(gate_up.shape), dmask_F


def _sizes(gate_up: Tensor, mask_F: Tensor | None) -> tuple[int, int]:
    """Return tokens and features; raise ValueError if the shapes do not fit."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [.., 2F], not {list(gate_up.shape)}")
    features = gate_up.shape[-1] // 2
    check_vector("the intermediate mask", mask_F, features, gate_up.device)
    return gate_up.shape[:-1].numel(), features


def _contiguous(mask_F: Tensor | None) -> Tensor | None:
    return None if mask_F is None else mask_F.contiguous()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    gate_up, mask_F = ctx.saved_tensors
    dgate_up, dmask_F = masked_swiglu_backward(dout, gate_up, mask_F)
    return dgate_up, None if mask_F is None else dmask_F


masked_swiglu.register_autograd(_backward, setup_context=_save)
