"""The two terms of cross entropy as custom ops over csrc/cross_entropy, without a copy of the logits in a wider dtype.

The gradient overwrites the logits if the caller permits it, otherwise a copy.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.ops.kernels.library import address, dtype_code, launching


@torch.library.custom_op("megashear::cross_entropy_terms", mutates_args=())
def cross_entropy_terms(
    logits: Tensor, labels: Tensor, first: int, columns: int, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and the label's logit, fp32 [..]. logits: [.., V]; labels: int64 [..]."""
    logits, labels = logits.contiguous(), labels.contiguous()
    sizes = _sizes(logits, labels, columns)
    log_sum, label_logit = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
    with launching(logits) as (library, executor):
        library.cross_entropy_forward(
            address(logits),
            address(labels),
            address(log_sum),
            address(label_logit),
            *sizes,
            first,
            dtype_code(logits),
            executor,
        )
    return log_sum, label_logit


@cross_entropy_terms.register_fake
def _(logits: Tensor, labels: Tensor, first: int, columns: int, overwrite: bool) -> tuple[Tensor, Tensor]:
    log_sum = logits.new_empty(labels.shape, dtype=torch.float32)
    return log_sum, torch.empty_like(log_sum)


@torch.library.custom_op("megashear::cross_entropy_gradient_", mutates_args=("logits",))
def cross_entropy_gradient_(
    logits: Tensor, labels: Tensor, log_sum: Tensor, dlog_sum: Tensor, dlabel_logit: Tensor, first: int, columns: int
) -> None:
    """Overwrite contiguous logits with their gradient. The gradients of both terms are fp32 [..]."""
    sizes = _sizes(logits, labels, columns)
    labels, dlog_sum, dlabel_logit = labels.contiguous(), dlog_sum.contiguous(), dlabel_logit.contiguous()
    with launching(logits) as (library, executor):
        library.cross_entropy_backward(
            address(logits),
            address(labels),
            address(log_sum),
            address(dlog_sum),
            address(dlabel_logit),
            *sizes,
            first,
            dtype_code(logits),
            executor,
        )


@cross_entropy_gradient_.register_fake
def _(
    logits: Tensor, labels: Tensor, log_sum: Tensor, dlog_sum: Tensor, dlabel_logit: Tensor, first: int, columns: int
) -> None:
    return None


def _sizes(logits: Tensor, labels: Tensor, columns: int) -> tuple[int, int, int]:
    """Return tokens, columns in memory and columns that count; raise ValueError if the shapes do not fit."""
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be [..] of logits [.., V], not {list(labels.shape)} and {list(logits.shape)}")
    if labels.dtype != torch.int64 or labels.device != logits.device:
        raise ValueError(f"labels must be int64 on {logits.device}, not {labels.dtype} on {labels.device}")
    if not 0 <= columns <= logits.shape[-1]:
        raise ValueError(f"columns must be 0 .. {logits.shape[-1]}, not {columns}")
    return labels.numel(), logits.shape[-1], columns


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, bool], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.first, ctx.columns, ctx.overwrite = inputs
    ctx.save_for_backward(logits, labels, output[0])


def _backward(ctx: Any, dlog_sum: Tensor, dlabel_logit: Tensor) -> tuple[Tensor, None, None, None, None]:
    logits, labels, log_sum = ctx.saved_tensors
    dlogits = logits.detach()
    if not (ctx.overwrite and logits.is_contiguous()):
        dlogits = dlogits.clone(memory_format=torch.contiguous_format)
    cross_entropy_gradient_(dlogits, labels, log_sum, dlog_sum, dlabel_logit, ctx.first, ctx.columns)
    return dlogits, None, None, None, None


cross_entropy_terms.register_autograd(_backward, setup_context=_save)
