"""Mask noise, hard concrete samples and their slopes as custom ops over csrc/hard_concrete, in one launch.

The forward pass also computes the slope dz/d log-alpha, so the backward pass is one product.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.ops.kernels.library import address, launching


def mask_noise(seed: int, step: int, micro_batch: int, granularity: int, units: int, device: torch.device) -> Tensor:
    """Draw uniform noise, fp32 [units] on `device`, bit-identical to the reference. seed is taken modulo 2^64."""
    uniform = torch.empty(units, dtype=torch.float32, device=device)
    with launching(uniform) as (library, executor):
        library.hard_concrete_noise(seed % 2**64, step, micro_batch, granularity, address(uniform), units, executor)
    return uniform


@torch.library.custom_op("megashear::hard_concrete", mutates_args=())
def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return sample and slope of each unit for given noise, in the shape of log_alpha and uniform, all fp32."""
    if uniform.shape != log_alpha.shape or uniform.device != log_alpha.device or uniform.dtype != torch.float32:
        raise ValueError(f"uniform must be fp32 {list(log_alpha.shape)} on {log_alpha.device}, as log_alpha is")
    return _sample(log_alpha, uniform.contiguous(), 0, 0, 0, 0)


@torch.library.custom_op("megashear::sample_hard_concrete", mutates_args=())
def sample_hard_concrete(
    log_alpha: Tensor, seed: int, step: int, micro_batch: int, granularity: int
) -> tuple[Tensor, Tensor]:
    """Draw noise and return sample and slope of each unit. log_alpha: fp32; seed: signed 64 bits."""
    return _sample(log_alpha, None, seed, step, micro_batch, granularity)


def _sample(
    log_alpha: Tensor, uniform: Tensor | None, seed: int, step: int, micro_batch: int, granularity: int
) -> tuple[Tensor, Tensor]:
    if log_alpha.dtype != torch.float32:
        raise ValueError(f"log_alpha must be fp32, not {log_alpha.dtype}")
    log_alpha = log_alpha.contiguous()
    z, slope = torch.empty_like(log_alpha), torch.empty_like(log_alpha)
    with launching(log_alpha) as (library, executor):
        library.hard_concrete_sample(
            address(log_alpha),
            address(uniform),
            seed % 2**64,
            step,
            micro_batch,
            granularity,
            address(z),
            address(slope),
            log_alpha.numel(),
            executor,
        )
    return z, slope


@hard_concrete.register_fake
def _(log_alpha: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    return log_alpha.new_empty(log_alpha.shape), log_alpha.new_empty(log_alpha.shape)


@sample_hard_concrete.register_fake
def _(log_alpha: Tensor, seed: int, step: int, micro_batch: int, granularity: int) -> tuple[Tensor, Tensor]:
    return log_alpha.new_empty(log_alpha.shape), log_alpha.new_empty(log_alpha.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the slope
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, dz: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    (slope,) = ctx.saved_tensors
    return dz * slope, None


def _backward_of_sample(ctx: Any, dz: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None, None]:
    (slope,) = ctx.saved_tensors
    return dz * slope, None, None, None, None


hard_concrete.register_autograd(_backward, setup_context=_save)
sample_hard_concrete.register_autograd(_backward_of_sample, setup_context=_save)
