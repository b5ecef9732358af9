"""Monkey-patches for megatron-core 0.16, each with the upstream issue it works around.

1. Loading the distributed optimizer copies every entry of a parameter's state from the checkpoint. torch's Adam keeps a
   step count there that the checkpoint stores elsewhere, which raises KeyError. Fix: pass the step count that was just
   loaded from the parameter groups.
2. Loading assigns one step count tensor to all parameters, and torch's Adam increments it once for each of them. Fix:
   clone it.
3. Saving drops the padding between buckets of the gradient buffer but slices parameters by their padded offsets. With
   more than one bucket (a tied embedding has its own), the state of other parameters is saved without an error. Fix:
   restore the padding.
4. Without Transformer Engine or Apex, torch's Adam is built in its default form, a dozen passes over memory. Fix:
select
   its fused form, one pass.
5. With one data-parallel rank, gradients and weights still go through collectives of one rank, which gloo copies. Fix:
   skip them.
6. Checkpoint writers report through a separate process that outlives a killed rank and ignores the signals that
   `train/signals.py` blocks. Fix: end the process with its rank.

`tests/parallel/test_checkpoint.py` covers 1 to 3, `tests/faults/test_killed_rank.py` covers 6.
"""

import functools
import multiprocessing
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megashear.processes import end_with_parent


def patch_optimizer_checkpoint(part: Any) -> None:
    """Apply fixes 1 and 3 to a distributed optimizer; skip other optimizers. Call once, after construction."""
    if not hasattr(part, "get_parameter_state_dp_zero"):
        return
    set_state, get_state = part._set_main_param_and_optimizer_states, part.get_parameter_state_dp_zero

    def set_with_step(parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[parameter]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        set_state(parameter, tensors | {"step": state["step"].clone()} if "step" in state else tensors)

    def get_with_padding(*args: Any, **kwargs: Any) -> Any:
        state = get_state(*args, **kwargs)
        for index, buffer in enumerate(part.buffers):
            for tensors in (state or {}).get(index, {}).values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key] = _restore_bucket_padding(tensors[key], buffer)
        return state

    part._set_main_param_and_optimizer_states = set_with_step
    part.get_parameter_state_dp_zero = get_with_padding


def _restore_bucket_padding(dense: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Move values from concatenated buckets without padding to the offsets of `param_index_map`."""
    padded = dense.new_zeros(buffer.numel)
    offset = 0
    for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
        padded[start : start + bucket.numel_unpadded] = dense[offset : offset + bucket.numel_unpadded]
        offset += bucket.numel_unpadded
    return padded


def separate_step_counts(part: Any) -> None:
    """Apply fix 2. Call after loading."""
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def use_fused_adam(part: Any) -> None:
    """Apply fix 4. Call after construction, and after loading, which restores the saved parameter groups.

    The fused form keeps its step counts on the parameters' device.
    """
    adam = getattr(part, "optimizer", None)
    if not isinstance(adam, torch.optim.Adam):  # includes AdamW
        return
    for group in adam.param_groups:
        group["foreach"], group["fused"] = None, True
    for parameter, state in adam.state.items():
        state["step"] = state["step"].to(parameter.device)


def skip_collectives_of_one(chunk: Any) -> None:
    """Apply fix 5 to a model chunk wrapped in DistributedDataParallel. Call once, after construction."""
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        sharded = chunk.ddp_config.use_distributed_optimizer
        ranks = group.intra_distributed_optimizer_instance_size if sharded else group.data_parallel_group.size()
        if ranks > 1 or any(bucket.gradient_scaling_factor != 1.0 for bucket in group.buckets):
            continue
        group.start_grad_sync = _do_nothing
        group.start_param_sync = _do_nothing


def end_results_queue_with_rank() -> None:
    """Apply fix 6. Call before saving. Only ranks that write start the process."""
    filesystem_async._get_write_results_queue = _results_queue


@functools.cache
def _results_queue() -> Any:
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    return manager.Queue()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a collective of one rank."""
