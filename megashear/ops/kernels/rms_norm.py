"""Masked RMSNorm as a custom op over csrc/masked_rms_norm; the forward leaves 1 / rms of each token for the backward.

One table of column sums, added in a fixed order, gives the gradients of both weight and mask.
Read next: `../reference.py` (`rms_norm`), csrc/masked_rms_norm/masked_rms_norm.h.
"""

import torch
from torch import Tensor

from megashear.ops.kernels.library import address, check_vector, dtype_code, launching


@torch.library.custom_op("megashear::masked_rms_norm", mutates_args=())
def masked_rms_norm(x: Tensor, weight_D: Tensor, mask_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x: [.., D], fp32 or bf16, and 1 / rms of each token, fp32 [..]. weight_D, mask_D: fp32 [D]."""
    tokens, hidden = _sizes(x, weight_D, mask_D)
    x, weight_D, mask_D = _contiguous(x, weight_D, mask_D)
    out = torch.empty_like(x)
    r = x.new_empty(x.shape[:-1], dtype=torch.float32)
    with launching(x) as (library, executor):
        library.masked_rms_norm_forward(
            address(x),
            address(weight_D),
            address(mask_D),
            address(out),
            address(r),
            eps,
            tokens,
            hidden,
            dtype_code(x),
            executor,
        )
    return out, r


@masked_rms_norm.register_fake
def _(x: Tensor, weight_D: Tensor, mask_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megashear::masked_rms_norm_backward", mutates_args=())
def masked_rms_norm_backward(
    dout: Tensor, x: Tensor, weight_D: Tensor, mask_D: Tensor | None, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its shape, of the weight and of the mask, fp32 [D] (the last empty where there is no mask)."""
    tokens, hidden = _sizes(x, weight_D, mask_D)
    x, weight_D, mask_D = _contiguous(x, weight_D, mask_D)
    dout, dx, dweight_D = dout.contiguous(), torch.empty_like(x), torch.empty_like(weight_D)
    dmask_D = weight_D.new_empty(0 if mask_D is None else hidden)
    with launching(x) as (library, executor):
        partial = weight_D.new_empty(library.strip_count(tokens), hidden)
        library.masked_rms_norm_backward(
            address(dout),
            address(x),
            address(weight_D),
            address(mask_D),
            address(r),
            address(dx),
            address(dweight_D),
            address(dmask_D),
            address(partial),
            tokens,
            hidden,
            dtype_code(x),
            executor,
        )
    return dx, dweight_D, dmask_D


@masked_rms_norm_backward.register_fake
def _(dout: Tensor, x: Tensor, weight_D: Tensor, mask_D: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight_D.new_empty(weight_D.shape),
        weight_D.new_empty(0 if mask_D is None else mask_D.shape[0]),
    )


def _sizes(x: Tensor, weight_D: Tensor, mask_D: Tensor | None) -> tuple[int, int]:
    """Tokens and hidden dimensions; ValueError where the shapes do not fit."""
    if x.dim() == 0:
        raise ValueError("x must have a hidden dimension")
    check_vector("the norm's weight", weight_D, x.shape[-1], x.device)
    check_vector("the hidden mask", mask_D, x.shape[-1], x.device)
    return x.shape[:-1].numel(), x.shape[-1]


def _contiguous(x: Tensor, weight_D: Tensor, mask_D: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.contiguous(), weight_D.contiguous(), None if mask_D is None else mask_D.contiguous()


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, mask_D, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight_D, mask_D, output[1])


def _backward(ctx, dout: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x, weight_D, mask_D, r = ctx.saved_tensors
    dx, dweight_D, dmask_D = masked_rms_norm_backward(dout, x, weight_D, mask_D, r)
    return dx, dweight_D, None if mask_D is None else dmask_D, None


masked_rms_norm.register_autograd(_backward, setup_context=_save)
