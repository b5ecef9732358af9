"""Faults of megatron-core 0.16 mended around its methods: three in saving and loading the distributed optimizer, two
that cost time, and a process that is left behind.

1. Loading copies every entry of a parameter's state from the checkpoint, and torch's own Adam keeps a step count
there which the checkpoint holds elsewhere: KeyError. The entry, set a moment before from the parameter groups, is
given to it.
2. Loading gives all parameters one and the same step count tensor, to which torch's Adam then adds once for each of
them.
3. Saving drops the padding between buckets of the gradient buffer but cuts parameters out by their padded places:
with more than one bucket (a tied embedding has its own) the state of other parameters is written, silently. The
padding is put back.
4. Without Transformer Engine or Apex, torch's Adam is made in its default form, a dozen passes over memory; it has
one that takes a single pass.
5. With a single data-parallel rank, gradients and weights are still sent through a collective of one, in which gloo
copies them.
6. Writers of a checkpoint report through a process that is started for it. It outlives a rank that is killed, and with
signals held from it (`train/signals.py`) nothing but SIGKILL ends it. Ours ends with its rank.
`tests/parallel/test_checkpoint.py` fails without each of the first three, `tests/faults/test_killed_rank.py` without
the last. Read next: `sharded.py`.
"""

import functools
import multiprocessing
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megashear.processes import end_with_parent


def repair(part: Any) -> None:
    """Mend 1 and 3 in a distributed optimizer; others are left as they are. To be called once, when it is made."""
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
                    tensors[key] = _with_bucket_padding(tensors[key], buffer)
        return state

    part._set_main_param_and_optimizer_states = set_with_step
    part.get_parameter_state_dp_zero = get_with_padding


def _with_bucket_padding(dense: torch.Tensor, buffer: Any) -> torch.Tensor:
    """The buffer's values at the places that `param_index_map` names, from buckets laid end to end without padding."""
    padded = dense.new_zeros(buffer.numel)
    offset = 0
    for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
        padded[start : start + bucket.numel_unpadded] = dense[offset : offset + bucket.numel_unpadded]
        offset += bucket.numel_unpadded
    return padded


def separate_step_counts(part: Any) -> None:
    """Mend 2; to be called after loading."""
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def use_fused_adam(part: Any) -> None:
    """Mend 4; to be called when the optimizer is made, and after loading, which takes groups as they were saved.

    The fused form keeps its step counts on the parameters' device.
    """
    adam = getattr(part, "optimizer", None)
    if not isinstance(adam, torch.optim.Adam):  # AdamW is one of its kinds
        return
    for group in adam.param_groups:
        group["foreach"], group["fused"] = None, True
    for parameter, state in adam.state.items():
        state["step"] = state["step"].to(parameter.device)


def skip_collectives_of_one(chunk: Any) -> None:
    """Mend 5 in a model chunk inside gradient buffers; to be called once, when it is made."""
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        sharded = chunk.ddp_config.use_distributed_optimizer
        ranks = group.intra_distributed_optimizer_instance_size if sharded else group.data_parallel_group.size()
        if ranks > 1 or any(bucket.gradient_scaling_factor != 1.0 for bucket in group.buckets):
            continue
        group.start_grad_sync = _do_nothing
        group.start_param_sync = _do_nothing


def end_results_queue_with_rank() -> None:
    """Mend 6; to be called before saving. A rank that has something to write then starts the process, no other."""
    filesystem_async._get_write_results_queue = _results_queue


@functools.cache
def _results_queue() -> Any:
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    return manager.Queue()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a collective of one rank."""
