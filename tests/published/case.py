"""The published model as this package builds it: arrays, shapes, settings by the `paper` preset, given mask noise.

The fixture already carries this package's names (`group` is the published head).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import OptimizerConfig, PruneConfig
from megashear.engine.layout import Layout
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.masks.constraint import build_constraint
from megashear.masks.hard_concrete_masks import HardConcreteMasks, clamp
from megashear.masks.mask_optimizer import MaskOptimizer
from megashear.masks.mask_values import Masks
from megashear.masks.sparsity_schedule import SparsitySchedule
from megashear.model.llama import Llama
from megashear.model.weight_io import load_weights
from megashear.train.step import Stepper

FIXTURE = Path(__file__).parent / "fixtures" / "published_steps.npz"
SOURCE = ModelShape(64, 4, 8, 8, 8, 96, 128)
TARGET = ModelShape(40, 3, 5, 5, 8, 56, 128)
GRANULARITIES = ("hidden", "group", "intermediate", "layer")
"""In the order of the fixture's columns of sparsities."""
STEP_OF_B, STEPS, ROWS = 5, 24, 3


class Arrays:
    """The fixture's arrays by name, as float64 tensors (tokens as int64)."""

    def __init__(self) -> None:
        with np.load(FIXTURE) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def __getitem__(self, name: str) -> Tensor:
        value = self.arrays[name]
        return torch.from_numpy(value.astype(np.int64 if value.dtype.kind == "i" else np.float64))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Everything below `prefix/`, by the rest of its name."""
        names = [name for name in self.arrays if name.startswith(f"{prefix}/")]
        return {name[len(prefix) + 1 :]: self[name] for name in names}

    def masks(self, prefix: str, device: torch.device) -> Masks:
        return Masks(**{name: value.to(device) for name, value in self.group(prefix).items()})


class Weights:
    """Tensors by Hugging Face name as a source for `load_weights`."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.named = named

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self.named[name].narrow(dim, start, stop - start)


class GivenMasks(HardConcreteMasks):
    """Masks whose samples take given noise: `noise` maps a step to a granularity's uniform numbers."""

    noise: dict[int, dict[str, Tensor]]

    def _sample_values(self, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
        assert micro_batch == 0
        uniform = {name: u.to(self.log_alpha[name].device) for name, u in self.noise[step].items()}
        return {name: ops.hard_concrete(value, uniform[name]) for name, value in self.log_alpha.items()}


class Float64Adam:
    """`WeightOptimizer`'s calls over float64 weights, which megatron-core's refuses: torch's Adam, the same clip."""

    def __init__(self, module: Llama, optimizer: OptimizerConfig) -> None:
        self.chunks = [module]
        betas = (optimizer.beta1, optimizer.beta2)
        self.adam = torch.optim.AdamW(
            module.parameters(), betas=betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def zero_gradients(self) -> None:
        self.adam.zero_grad(set_to_none=False)

    def prepare(self) -> torch.Tensor:
        return torch.stack([p.grad.double().square().sum() for p in self.chunks[0].parameters()]).sum()

    def scale(self, norm: float, limit: float) -> float:
        factor = min(1.0, limit / (norm + 1e-6))
        for parameter in self.chunks[0].parameters():
            parameter.grad.mul_(factor)
        return factor

    def step(self, learning_rate: float) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()


def build_model(
    layout: Layout, shape: ModelShape, named: dict[str, Tensor], prune: PruneConfig, dtype: torch.dtype = torch.float64
) -> Llama:
    """The whole model in one chunk, masked as the configuration says."""
    config = transformer_config(shape, ParallelConfig(), dtype)
    exact = prune.masking == "exact"
    module = Llama(shape, config, layout, range(shape.num_layers), True, True, mask_embedding=exact)
    load_weights(module, Weights(named))
    return module


def build_masks(
    arrays: Arrays, layout: Layout, prune: PruneConfig, log_alpha: str, multipliers: str | None, dtype: torch.dtype
) -> MaskOptimizer:
    """The mask optimizer with a log-alpha of the fixture, projected, and multipliers (None: 0, as they start)."""
    masks = GivenMasks(SOURCE, TARGET, prune, seed=0, device=layout.device, dtype=dtype)
    schedule = SparsitySchedule(prune, tuple(masks.specs))
    state = MaskOptimizer(masks, build_constraint(masks, schedule), schedule)
    with torch.no_grad():
        for name, value in masks.log_alpha.items():
            value.copy_(arrays[f"{log_alpha}/{name}"])
            clamp(value, prune.log_alpha_limit)
        for name, pair in state.constraint.multipliers.items():
            if multipliers is not None:
                pair.copy_(arrays[f"{multipliers}/{name}"])
    return state


def build_stepper(
    layout: Layout, module: Llama, masks: MaskOptimizer, prune: PruneConfig, dtype: torch.dtype
) -> Stepper:
    """The real step over the real optimizer; in float64 over the one above."""
    weights: Any
    if dtype == torch.float64:
        weights = Float64Adam(module, prune.optimizer)
    else:
        weights = WeightOptimizer([module], prune.optimizer, dtype, distributed=True)
    return Stepper(layout, weights, masks, 0, ROWS, prune.optimizer.clip_norm, prune.clip == "joint")


def logits_of(module: Llama, tokens: Tensor, masks: Masks | None = None) -> Tensor:
    """Logits [B, S, V] on the CPU."""
    with torch.no_grad():
        return module(tokens.to(module.layout.device), None, masks).transpose(0, 1).cpu()


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference as a share of the published tensor's largest value."""
    return float((ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300))
