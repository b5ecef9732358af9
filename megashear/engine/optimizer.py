"""Gradient buffers and Adam for the weights, built on megatron-core's DistributedDataParallel and distributed
optimizer.

Clipping is split into norm, scale and step, because a pruning step may include the masks' gradients in the same norm,
as the published code does. Adam is fused: Transformer Engine's or Apex's if megatron-core finds them, otherwise
torch's.

Adam's moments can be exchanged with the weights (`shown_moment`), so that transformations of the weights apply to
them. With the distributed optimizer each data-parallel rank holds a part of every moment. Copied into the fp32 masters,
moments reach the model's parameters as weights do after a step, under every layout, rounded to the weights' dtype.
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
from megashear.engine.patches import patch_optimizer_checkpoint, skip_collectives_of_one, use_fused_adam


class WeightOptimizer:
    """Adam over the weights of this rank's chunks, with gradients accumulated in fp32 buffers."""

    def __init__(
        self, modules: list[MegatronModule], optimizer: OptimizerConfig, dtype: torch.dtype, distributed: bool
    ) -> None:
        """Wrap the chunks and build the optimizer.

        Args:
            modules: Model chunks of this rank. `chunks` holds them wrapped in DistributedDataParallel.
            optimizer: Hyperparameters of Adam.
            dtype: Dtype of the weights.
            distributed: Shard the optimizer state over data-parallel ranks.
        """
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
                lr=0.0,  # set by every step
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
            patch_optimizer_checkpoint(part)
            use_fused_adam(part)
        for chunk in self.chunks:
            skip_collectives_of_one(chunk)
        # megatron-core shares one config among chunks, and the gradient hooks of each chunk read it.
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads

    @property
    def parts(self) -> list[Any]:
        """megatron-core's optimizers, of which `optimizer` may chain several."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def zero_gradients(self) -> None:
        """Clear the gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def prepare(self) -> torch.Tensor:
        """Copy the reduced gradients to the masters and compute the squared global L2 norm.

        megatron-core's own norm synchronizes with the device once per parameter.

        Returns:
            Squared norm, fp64 scalar. Each weight counts once over all ranks.
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
        """Scale gradients by min(1, limit / (norm + 1e-6)), as torch and megatron-core do, and return the factor."""
        factor = min(1.0, limit / (norm + 1e-6))
        if factor < 1.0:
            gradients = [p.grad for part in self.parts for p in part.get_parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        return factor

    def step(self, learning_rate: float) -> None:
        """Take one Adam step and gather the new weights on every rank."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step_with_ready_grads()

    def ensure_state(self) -> None:
        """Create Adam's state before the first step so that it can be saved or loaded: zero moments, step count 0."""
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
        """Copy the weights into the fp32 masters. Call after loading weights into the chunks."""
        self.optimizer.reload_model_params()


def unwrap(chunk: torch.nn.Module) -> Any:
    """Return the model chunk inside DistributedDataParallel."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def kept_weights(weights: WeightOptimizer) -> Iterator[None]:
    """Restore the weights bit for bit on exit. Inside the context the parameters may be overwritten."""
    weights.ensure_state()
    kept = [master.detach().clone() for master, _ in _masters(weights)]
    try:
        yield
    finally:
        _publish(weights, kept)


@contextmanager
def shown_moment(weights: WeightOptimizer, name: str) -> Iterator[None]:
    """Copy the moment `name` into the parameters for the duration of the context, then restore the weights."""
    with kept_weights(weights):
        _publish(weights, [state[name] for _, state in _masters(weights)])
        yield


@torch.no_grad()
def take_moment(weights: WeightOptimizer, name: str) -> None:
    """Set the moment `name` to the values of the parameters. Call inside `kept_weights`."""
    weights.reload_weights()
    for master, state in _masters(weights):
        state[name].copy_(master)


def count_steps(weights: WeightOptimizer, steps: int) -> None:
    """Set the number of steps that Adam uses for bias correction."""
    for part in weights.parts:
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine and Apex count by group
                group["step"] = steps
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)


def _masters(weights: WeightOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Iterate over this rank's fp32 masters and their Adam state, in a fixed order."""
    for part in weights.parts:
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                yield master, part.optimizer.state[master]


@torch.no_grad()
def _publish(weights: WeightOptimizer, values: list[torch.Tensor]) -> None:
    """Copy values into the masters and the parameters of every data-parallel rank."""
    for (master, _), value in zip(_masters(weights), values, strict=True):
        master.copy_(value)
    for part in weights.parts:
        copy = getattr(part, "_copy_main_params_to_model_params", None)
        if copy is not None:
            copy()
    for chunk in weights.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
