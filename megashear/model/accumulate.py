"""Gradients in bf16 added to the fp32 buffers of megatron-core in one pass over memory.

Its own hook, which comes after ours and then finds nothing left to add, has torch widen each gradient into a copy first
(on the CPU; on CUDA one kernel does both). The sums have the same bits.
"""

import torch
from torch import Tensor, nn

from megashear import ops


def accumulate_in_one_pass(module: nn.Module) -> None:
    """Have every parameter that is not fp32 give its gradient to its buffer `main_grad`, where it has one."""
    for parameter in module.parameters():
        if parameter.dtype != torch.float32:
            parameter.register_post_accumulate_grad_hook(_add_to_buffer)


def _add_to_buffer(parameter: Tensor) -> None:
    total, gradient = getattr(parameter, "main_grad", None), parameter.grad
    if total is None or gradient is None or total.dtype != torch.float32:
        return
    width = parameter.shape[-1]
    ops.live_add(total.view(-1, width), None, None, gradient.reshape(-1, width))
    parameter.grad = None
