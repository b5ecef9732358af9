"""Masked RMSNorm, optionally after adding a masked branch to the residual, as custom ops over csrc/masked_rms_norm.

The forward pass saves 1 / rms of each token for the backward pass, which both ops share. The gradients of weight and
masks are column sums of a table, added in a fixed order.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.ops.kernels.library import address, check_vector, dtype_code, launching, matrix, rows


@torch.library.custom_op("megashear::masked_rms_norm", mutates_args=())
def masked_rms_norm(x: Tensor, weight_D: Tensor, mask_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [.., D] (fp32, bf16, fp16) and 1 / rms per token, fp32 [..]. weight_D, mask_D: fp32 [D]."""
    _, out, r = _forward(x, None, None, weight_D, mask_D, eps)
    return out, r


@torch.library.custom_op("megashear::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, branch: Tensor, branch_mask_D: Tensor | None, weight_D: Tensor, mask_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + branch * branch_mask, its norm, and 1 / rms of each token. branch: x's shape and dtype."""
    if branch.shape != x.shape or branch.dtype != x.dtype or branch.device != x.device:
        raise ValueError(f"the branch must be {x.dtype} {list(x.shape)} on {x.device}, as the residual is")
    return _forward(x, branch, branch_mask_D, weight_D, mask_D, eps)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    branch_mask_D: Tensor | None,
    weight_D: Tensor,
    mask_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum (empty without a branch), norm, and 1 / rms."""
    tokens, hidden = _sizes(x, branch_mask_D, weight_D, mask_D)
    x, branch = rows(x), None if branch is None else rows(branch)
    branch_mask_D, weight_D, mask_D = _contiguous(branch_mask_D), weight_D.contiguous(), _contiguous(mask_D)
    total, out = x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape)
    r = x.new_empty(x.shape[:-1], dtype=torch.float32)
    with launching(x) as (library, executor):
        library.masked_rms_norm_forward(
            matrix(x),
            matrix(branch),
            address(branch_mask_D),
            address(weight_D),
            address(mask_D),
            address(total),
            address(out),
            address(r),
            eps,
            tokens,
            hidden,
            dtype_code(x),
            executor,
        )
    return total, out, r


@masked_rms_norm.register_fake
def _(x: Tensor, weight_D: Tensor, mask_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@add_rms_norm.register_fake
def _(
    x: Tensor, branch: Tensor, branch_mask_D: Tensor | None, weight_D: Tensor, mask_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megashear::masked_rms_norm_backward", mutates_args=())
def masked_rms_norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    branch_mask_D: Tensor | None,
    weight_D: Tensor,
    mask_D: Tensor | None,
    r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, branch, weight, mask and branch mask.

    x is the input of the norm, dtotal its other gradient. Without a branch mask the gradients of branch and branch mask
    are empty (the branch's equals that of x); without a mask that of the mask is empty. Vectors are fp32 [D].
    """
    tokens, hidden = _sizes(x, branch_mask_D, weight_D, mask_D)
    dout, x = rows(dout), rows(x)
    dtotal, branch = None if dtotal is None else rows(dtotal), None if branch is None else rows(branch)
    branch_mask_D, weight_D, mask_D = _contiguous(branch_mask_D), weight_D.contiguous(), _contiguous(mask_D)
    dx, dbranch, dweight_D, dmask_D, dbranch_mask_D = _gradients(x, branch, branch_mask_D, weight_D, mask_D)
    with launching(x) as (library, executor):
        partial = weight_D.new_empty(1 if branch is None else 2, library.strip_count(tokens), hidden)
        library.masked_rms_norm_backward(
            matrix(dout),
            matrix(dtotal),
            matrix(x),
            matrix(branch),
            address(branch_mask_D),
            address(weight_D),
            address(mask_D),
            address(r),
            address(dx),
            address(dbranch),
            address(dweight_D),
            address(dmask_D),
            address(dbranch_mask_D),
            address(partial),
            tokens,
            hidden,
            dtype_code(x),
            executor,
        )
    return dx, dbranch, dweight_D, dmask_D, dbranch_mask_D


@masked_rms_norm_backward.register_fake
def _(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    branch_mask_D: Tensor | None,
    weight_D: Tensor,
    mask_D: Tensor | None,
    r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, branch, branch_mask_D, weight_D, mask_D)


def _gradients(
    x: Tensor, branch: Tensor | None, branch_mask_D: Tensor | None, weight_D: Tensor, mask_D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of the backward pass."""
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if branch is None else x.shape),
        weight_D.new_empty(weight_D.shape),
        weight_D.new_empty(0 if mask_D is None else weight_D.shape),
        weight_D.new_empty(0 if branch_mask_D is None else weight_D.shape),
    )


def _sizes(x: Tensor, branch_mask_D: Tensor | None, weight_D: Tensor, mask_D: Tensor | None) -> tuple[int, int]:
    """Return tokens and hidden dimensions; raise ValueError if the shapes do not fit."""
    if x.dim() == 0:
        raise ValueError("x must have a hidden dimension")
    check_vector("the norm's weight", weight_D, x.shape[-1], x.device)
    check_vector("the hidden mask", mask_D, x.shape[-1], x.device)
    check_vector("the branch mask", branch_mask_D, x.shape[-1], x.device)
    return x.shape[:-1].numel(), x.shape[-1]


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, mask_D, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for 1 / rms
    ctx.save_for_backward(x, weight_D, mask_D, output[1])


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x, weight_D, mask_D, r = ctx.saved_tensors
    dx, _, dweight_D, dmask_D, _ = masked_rms_norm_backward(dout, None, x, None, None, weight_D, mask_D, r)
    return dx, dweight_D, None if mask_D is None else dmask_D, None


def _save_sum(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, branch, branch_mask_D, weight_D, mask_D, _ = inputs
    total, _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    saved = branch if branch_mask_D is not None else None  # read only for the branch mask's gradient
    ctx.save_for_backward(total, saved, branch_mask_D, weight_D, mask_D, r)


def _backward_of_sum(
    ctx: Any, dtotal: Tensor | None, dout: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    total, branch, branch_mask_D, weight_D, mask_D, r = ctx.saved_tensors
    if dout is None and dtotal is None:
        return None, None, None, None, None, None
    dout = torch.zeros_like(total) if dout is None else dout
    dx, dbranch, dweight_D, dmask_D, dbranch_mask_D = masked_rms_norm_backward(
        dout, dtotal, total, branch, branch_mask_D, weight_D, mask_D, r
    )
    dmask = None if mask_D is None else dmask_D
    if branch is None:
        return dx, dx, None, dweight_D, dmask, None
    return dx, dbranch, dbranch_mask_D, dweight_D, dmask, None


masked_rms_norm.register_autograd(_backward, setup_context=_save)
add_rms_norm.register_autograd(_backward_of_sum, setup_context=_save_sum)
