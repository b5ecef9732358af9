"""Gradient buffers and Adam of the weights, by megatron-core: DistributedDataParallel, distributed optimizer, fp32
masters.

Clipping is taken apart into norm, scale and step, because a pruning step may count the masks' gradients in the same
norm (as the published code does). Adam is fused: Transformer Engine's or Apex's where megatron-core finds them, else
torch's. Read next: `sharded.py`.

Adam's moments as whole tensors: shown in place of the weights, so that what moves weights can move them too.

Under the distributed optimizer each data-parallel rank holds a part of every moment. Put where the fp32 masters are,
moments reach the model's parameters the way weights do after a step, under every layout; they are rounded to the
weights' dtype on the way. Read next: `optimizer.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule

from megashear.config.training_schema import OptimizerConfig
from megashear.engine.device import rank_device
from megashear.engine.patches import repair, skip_collectives_of_one, use_fused_adam


class WeightOptimizer:
    """Adam over the weights of this rank's chunks, with gradients accumulated in fp32 buffers."""

    def __init__(
        self, modules: list[MegatronModule], optimizer: OptimizerConfig, dtype: torch.dtype, distributed: bool
    ) -> None:
        """modules: plain chunks; `chunks` holds them wrapped. distributed: shard the state over data-parallel ranks."""
        config = modules[0].config
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=False
        )
        self.chunks = [
            DistributedDataParallel(config, settings, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            CoreOptimizerConfig(
                optimizer="adam",
                lr=0.0,  # each step brings its own
                min_lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                clip_grad=0.0,
                use_distributed_optimizer=distributed,
            ),
            self.chunks,
            use_gloo_process_groups=False,
        )
        for part in self.parts:
            repair(part)
            use_fused_adam(part)
        for chunk in self.chunks:
            skip_collectives_of_one(chunk)
        # megatron-core shares one config among chunks; each chunk's gradient hooks read it.
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads

    @property
    def parts(self) -> list[Any]:
        """megatron-core's optimizers behind the one that it gave (it may chain several)."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def zero_gradients(self) -> None:
        """Clear the gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def prepare(self) -> torch.Tensor:
        """Take over the reduced gradients; returns the square of their global L2 norm, fp64 [], every weight counted
        once over all ranks.

        megatron-core's own norm waits for the device once for every parameter.
        """
        self.optimizer.prepare_grads()
        total = torch.zeros((), dtype=torch.float64, device=rank_device())
        for part in self.parts:
            norms = torch._foreach_norm(part.get_main_grads_for_grad_norm())
            square = torch.stack(norms).double().square().sum() if norms else torch.zeros_like(total)
            dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
            total += square
        return total

    @torch.no_grad()
    def scale(self, norm: float, limit: float) -> float:
        """Scale gradients by min(1, limit / (norm + 1e-6)), as torch and megatron-core clip; returns the factor."""
        factor = min(1.0, limit / (norm + 1e-6))
        if factor < 1.0:
            gradients = [one.grad for part in self.parts for one in part.get_parameters() if one.grad is not None]
            torch._foreach_mul_(gradients, factor)
        return factor

    def step(self, learning_rate: float) -> None:
        """One Adam step at a learning rate, and the new weights on every rank."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step_with_ready_grads()

    def ensure_state(self) -> None:
        """Make Adam's moments before the first step, so that they can be saved or filled: zeros, step count 0."""
        for part in self.parts:
            if getattr(part, "optimizer", None) is None or part.optimizer.state:
                continue
            rates = [group["lr"] for group in part.optimizer.param_groups]
            for group in part.optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            part.optimizer.step()
            part.optimizer.zero_grad()
            for group, rate in zip(part.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()

    def reload_weights(self) -> None:
        """Copy the weights into the fp32 masters (after loading weights into the chunks)."""
        self.optimizer.reload_model_params()


def unwrap(chunk: torch.nn.Module) -> Any:
    """The plain model chunk inside gradient buffers."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


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
