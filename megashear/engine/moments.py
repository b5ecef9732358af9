"""Adam's moments as whole tensors: shown in place of the weights, so that what moves weights can move them too.

Under the distributed optimizer each data-parallel rank holds a part of every moment. Put where the fp32 masters are,
moments reach the model's parameters the way weights do after a step, under every layout; they are rounded to the
weights' dtype on the way. Read next: `optimizer.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megashear.engine.optimizer import WeightOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def kept_weights(weights: WeightOptimizer) -> Iterator[None]:
    """While it lasts, the chunks' parameters may hold anything; afterwards the weights again, bit for bit."""
    weights.ensure_state()
    kept = [master.detach().clone() for master, _ in _masters(weights)]
    try:
        yield
    finally:
        _publish(weights, kept)


@contextmanager
def shown_moment(weights: WeightOptimizer, name: str) -> Iterator[None]:
    """While it lasts, the chunks' parameters hold the moment `name`; afterwards the weights again, bit for bit."""
    with kept_weights(weights):
        _publish(weights, [state[name] for _, state in _masters(weights)])
        yield


@torch.no_grad()
def take_moment(weights: WeightOptimizer, name: str) -> None:
    """Make what the chunks' parameters hold the moment `name`; to be called within `kept_weights`."""
    weights.reload_weights()
    for master, state in _masters(weights):
        state[name].copy_(master)


def count_steps(weights: WeightOptimizer, steps: int) -> None:
    """Have Adam correct its moments' bias as after so many steps."""
    for part in weights.parts:
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine and Apex count by group
                group["step"] = steps
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)


def _masters(weights: WeightOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """This rank's parts of what Adam updates, and their state, in a fixed order."""
    for part in weights.parts:
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                yield master, part.optimizer.state[master]


@torch.no_grad()
def _publish(weights: WeightOptimizer, values: list[torch.Tensor]) -> None:
    """Put values where the masters are, and into the parameters of every data-parallel rank."""
    for (master, _), value in zip(_masters(weights), values, strict=True):
        master.copy_(value)
    for part in weights.parts:
        copy = getattr(part, "_copy_main_params_to_model_params", None)
        if copy is not None:
            copy()
    for chunk in weights.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
