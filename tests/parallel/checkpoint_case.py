"""Train, save, load and train on under a layout; called on the ranks of `launch.Ranks`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from helpers.models import SHAPES, Drawn, build_model
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import OptimizerConfig
from megashear.engine import sharded_checkpoint as sharded
from megashear.engine.collectives import barrier
from megashear.engine.layout import Layout
from megashear.engine.optimizer import WeightOptimizer
from megashear.model.micro_batch import local_rows, micro_batches
from megashear.model.weight_io import RandomWeights, TensorSource
from megashear.train.step import Stepper
from parallel.step_case import whole

BATCH, LENGTH = 4, 24
# An epsilon at the gradients' size: updates depend on moments and step count, yet do not magnify rounding as signs do.
ADAM = OptimizerConfig(learning_rate=0.01, eps=1e-3, weight_decay=0.01)


def train_and_save(
    folder: str, shape: str, parallel: dict[str, Any], dtype: str = "float32", layers: int = 3
) -> dict[str, Any]:
    """Two steps, a checkpoint, two more steps; what the weights were then, and what came after."""
    source = replace(SHAPES[shape], num_layers=layers)
    layout, weights = trainer(source, parallel, getattr(torch, dtype), Drawn(source))
    losses(layout, weights, range(2))
    save(weights, layout, folder)
    return {"weights": whole(weights), "losses": losses(layout, weights, range(2, 4)), "after": whole(weights)}


def load_and_train(
    folder: str, shape: str, parallel: dict[str, Any], dtype: str = "float32", layers: int = 3, again: str | None = None
) -> dict[str, Any]:
    """Other weights, upon which the checkpoint is loaded (and saved to `again`), and the same two steps."""
    source = replace(SHAPES[shape], num_layers=layers)
    layout, weights = trainer(source, parallel, getattr(torch, dtype), RandomWeights(source, seed=1))
    sharded.load(weights, Path(folder))
    loaded = whole(weights)
    if again is not None:
        save(weights, layout, again)
    return {"weights": loaded, "losses": losses(layout, weights, range(2, 4)), "after": whole(weights)}


def trainer(
    shape: ModelShape, parallel: dict[str, Any], dtype: torch.dtype, source: TensorSource
) -> tuple[Layout, WeightOptimizer]:
    layout, chunks = build_model(shape, ParallelConfig(**parallel), source, dtype)
    return layout, WeightOptimizer(list(chunks), ADAM, dtype, distributed=True)


def losses(layout: Layout, weights: WeightOptimizer, steps: range) -> list[float]:
    """Train on the batches of these steps."""
    stepper, found = Stepper(layout, weights, None, 0, 1, clip_norm=1.0, clip_jointly=False), []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        samples = torch.randint(0, 101, (BATCH, LENGTH + 1), generator=generator)
        batches = micro_batches(samples[local_rows(BATCH, layout, 1)], layout, 1, layout.device)
        found.append(stepper.run(batches, step, 1.0, ADAM.learning_rate).loss)
    return found


def save(weights: WeightOptimizer, layout: Layout, folder: str) -> None:
    if layout.is_main:
        Path(folder).mkdir()
    barrier()
    sharded.save(weights, Path(folder))


def saved_tensors(folder: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by its key: weights, fp32 masters, moments. On one rank."""
    loaded = dist_checkpointing.load_plain_tensors(folder)
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
