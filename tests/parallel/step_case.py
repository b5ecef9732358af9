"""One pruning step under a layout, with all that must not depend on it; called on the ranks of `launch.Ranks`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.models import SHAPES, TARGETS, Drawn, build_model
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import BatchConfig, OptimizerConfig, PruneConfig
from megashear.engine.collectives import gather_objects
from megashear.engine.layout import Layout
from megashear.engine.optimizer import WeightOptimizer, unwrap
from megashear.masks.mask_optimizer import MaskOptimizer, build_mask_optimizer
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches
from megashear.model.weight_io import gather_tensors
from megashear.train.step import Stepper

# Divisible by data- and tensor-parallel sizes up to 4 (12 micro-batches also by 3).
MICRO_BATCHES, LENGTH, STEP, SEED = 4, 24, 3, 11

# With so large an epsilon Adam's first step is nearly learning rate / eps times the gradient: rounding in the gradient
# stays rounding in the weights. With a small one the first step is the gradient's sign.
PROPORTIONAL = OptimizerConfig(learning_rate=1e4, eps=100.0)


class Recorder(Stepper):
    """A stepper that keeps the gradients as the optimizer is about to take them: reduced, before clipping."""

    gradients: dict[str, Tensor]
    mask_gradients: Tensor

    def forward_backward(self, batches: list[MicroBatch], step: int) -> Tensor:
        loss = super().forward_backward(batches, step)
        self.mask_gradients = self.mask_optimizer.gradients_flat().clone()
        shards = self.weights.parts[0].config.use_distributed_optimizer
        self.gradients = {} if shards else whole(self.weights, lambda parameter: parameter.main_grad)
        return loss


def pruning_step(
    shape: str,
    layers: int,
    parallel: dict[str, Any],
    sharded: bool,
    recompute: bool = False,
    micro: int = MICRO_BATCHES,
) -> dict[str, Any]:
    """Loss, gradients, masks and what the step made of them.

    sharded: by the distributed optimizer, which leaves no rank with whole gradients of weights; they are left out then.
    """
    source = replace(SHAPES[shape], num_layers=layers)
    layout, chunks = build_model(source, ParallelConfig(**parallel), Drawn(source), recompute=recompute)
    weights = WeightOptimizer(chunks, PROPORTIONAL, torch.float32, distributed=sharded)
    masks = some_masks(source, TARGETS[shape], layout)
    stepper = Recorder(layout, weights, masks, SEED, 1, clip_norm=1.0, clip_jointly=True)
    samples = torch.randint(0, 101, (micro, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batches = micro_batches(samples[local_rows(micro, layout, 1)], layout, 1, layout.device)
    drawn = {f"{index}.{name}": value for index in range(2) for name, value in sampled(masks, index).items()}
    result = stepper.run(batches, STEP, 1.0, PROPORTIONAL.learning_rate)
    return {
        "loss": result.loss,
        "gradient norm": result.grad_norm,
        "lagrangian": result.lagrangian,
        "skipped": result.skipped,
        "masks": drawn,
        "gradients": stepper.gradients,
        "mask gradients": stepper.mask_gradients,
        "clipped log-alpha gradients": {name: value.grad.clone() for name, value in masks.masks.log_alpha.items()},
        "multiplier gradients": {name: value.grad.clone() for name, value in masks.constraint.multipliers.items()},
        "weights": whole(weights),
        "log-alpha": {name: value.detach().clone() for name, value in masks.masks.log_alpha.items()},
        "multipliers": {name: value.detach().clone() for name, value in masks.constraint.multipliers.items()},
        "micro-batches": gather_objects([batch.index for batch in batches]),
        "every rank's log-alpha": gather_objects(
            [float(value.detach().double().sum()) for value in masks.masks.log_alpha.values()]
        ),
    }


def some_masks(source: ModelShape, target: ModelShape, layout: Layout) -> MaskOptimizer:
    """Masks amid their training: log-alpha spread, so that samples hold zeros, ones and all between."""
    prune = PruneConfig(
        log_alpha_init=1.0,
        batch=BatchConfig(steps=8),
        constraint="lagrangian",
        sparsity_warmup_steps=4,
        sharpening=1.0,
        freeze_steps=0,
    )
    masks = build_mask_optimizer(source, target, prune, seed=7, device=layout.device)
    with torch.no_grad():
        for number, (log_alpha, pair) in enumerate(
            zip(masks.masks.log_alpha.values(), masks.constraint.multipliers.values(), strict=True)
        ):
            log_alpha += torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(number))
            pair += torch.tensor([0.02, 0.05])
    return masks


def sampled(masks: MaskOptimizer, micro_batch: int) -> dict[str, Tensor]:
    """The masks of one micro-batch by name."""
    values = vars(masks.masks.sample(SEED, STEP, micro_batch))
    return {name: value.detach().clone() for name, value in values.items() if value is not None}


def whole(weights: WeightOptimizer, value: Any = Tensor.detach) -> dict[str, Tensor]:
    """Whole tensors, by Hugging Face's names, of all stages on all ranks."""
    mine: dict[str, Tensor] = {}
    for chunk in weights.chunks:
        mine |= {name: tensor.clone() for name, tensor in gather_tensors(unwrap(chunk), value)}
    return {name: tensor for one in gather_objects(mine) for name, tensor in one.items()}
