"""Optimizer of masks: Adam over log-alpha (descent) and the constraint's multipliers (ascent).

Masters, gradients and moments are fp32 and replicated on every rank. One training step:

    optimizer.zero_gradients()
    masks = optimizer.masks.sample(seed, step, micro_batch)    # per micro-batch; backward fills the gradients
    all_reduce(optimizer.gradients_flat())                     # in place
    optimizer.add_constraint_gradients(step)
    optimizer.scale_gradients(...)                             # if gradients are clipped jointly
    optimizer.step(factor, step)                               # Adam, sharpening, then the next step's constraint

Sources: Sheared LLaMA, section 2.1 and appendix A.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.config.training_schema import PruneConfig
from megashear.errors import CheckpointError
from megashear.masks.constraint import Constraint, build_constraint
from megashear.masks.hard_concrete_masks import HardConcreteMasks
from megashear.masks.kept_units import describe_undecided
from megashear.masks.sparsity_schedule import SparsitySchedule

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class MaskOptimizer:
    """Updates masks and multipliers, and applies the sparsity schedule after each step.

    Attributes:
        masks: The learned masks.
        constraint: The sparsity constraint, which owns the multipliers.
        schedule: The sparsity schedule of the pruning phase.
        undecided: Problems of the masks when they were frozen, one sentence each.
    """

    def __init__(self, masks: HardConcreteMasks, constraint: Constraint, schedule: SparsitySchedule) -> None:
        """Apply the constraint of step 0 and allocate the gradients."""
        self.masks, self.constraint, self.schedule = masks, constraint, schedule
        self.undecided: list[str] = []
        self._apply_schedule(0)
        self._rates = schedule.rates()
        self._adam = torch.optim.Adam(
            [
                {"params": list(masks.log_alpha.values()), "maximize": False},
                {"params": list(constraint.multipliers.values()), "maximize": True},
            ],
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            fused=True,
        )
        # All gradients are views of one buffer, log-alpha's first: one all-reduce, one norm, one scaling.
        parameters = self.parameters()
        sizes = [parameter.numel() for parameter in parameters]
        self._gradient = torch.zeros(sum(sizes), device=parameters[0].device, dtype=parameters[0].dtype)
        for parameter, part in zip(parameters, self._gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def parameters(self) -> list[Tensor]:
        """Log-alpha of every learned granularity, then the multipliers."""
        return [*self.masks.log_alpha.values(), *self.constraint.multipliers.values()]

    @torch.no_grad()
    def warm_start(self, scores: Mapping[str, Tensor]) -> None:
        """Initialize log-alpha from importance scores before the first step; see `HardConcreteMasks.spread_by_scores`.

        Under `projected`, log-alpha spreads over +- `importance.spread` and the constraint shifts it. Under
        `lagrangian`, which shifts nothing, it starts above 0, so that nearly all samples are nonzero as without scores.
        """
        self.masks.spread_by_scores(scores, *self.constraint.warm_start_range())
        self._apply_schedule(0)

    @torch.no_grad()
    def _apply_schedule(self, step: int) -> None:
        """Change log-alpha to what the schedule requires at a step: constrained, or frozen."""
        if self.schedule.freezes_at(step):
            if self.schedule.projected:  # judge the masks as a step with learned masks would find them
                self.constraint.apply_to(self.masks, step)
            self.undecided = self.describe_undecided()
        if self.schedule.is_frozen(step):
            self.masks.freeze()
        else:
            self.constraint.apply_to(self.masks, step)

    def describe_undecided(self) -> list[str]:
        """Problems that cutting the masks now would have, one sentence each; empty if there are none."""
        return describe_undecided(self.masks.log_alpha, self.masks.specs, self.masks.config)

    # Gradients

    def add_constraint_gradients(self, step: int) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """Add the constraint's gradients once, after the reduction: they are the same on every rank.

        Returns:
            The result of `Constraint.loss`, with the loss detached.
        """
        loss, info = self.constraint.loss(self.masks, step)
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), info

    def zero_gradients(self) -> None:
        """Set every gradient to 0; call it before the first micro-batch of a step."""
        self._gradient.zero_()

    def gradients_flat(self) -> Tensor:
        """Gradients of log-alpha as one flat view, for an all-reduce in place (data give multipliers no gradients)."""
        return self._gradient[: sum(value.numel() for value in self.masks.log_alpha.values())]

    def set_gradients_flat(self, flat: Tensor) -> None:
        """Copy reduced gradients of log-alpha, in the layout of `gradients_flat`."""
        self.gradients_flat().copy_(flat)

    def grad_norm_squared(self) -> Tensor:
        """Sum of squares of all gradients, 0-d; a global norm counts it once, since every rank holds the same."""
        return self._gradient.square().sum()

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply every gradient, as a joint clip does."""
        self._gradient.mul_(factor)

    # Updates

    @torch.no_grad()
    def step(self, learning_rate_factor: float, step: int) -> None:
        """Take one Adam step, sharpen, then apply the constraint of step + 1. Frozen masks do not change.

        Args:
            learning_rate_factor: Factor of the learning rate schedule on both rates.
            step: Step of the phase, from 0.
        """
        if self.schedule.is_frozen(step):
            return
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate_factor
        self._adam.step()
        sharpening_factor = self.schedule.sharpening_factor()
        for log_alpha in self.masks.log_alpha.values():
            log_alpha.mul_(sharpening_factor)
        self.constraint.clamp_multipliers()
        self._apply_schedule(step + 1)

    @torch.no_grad()
    def skip(self, step: int) -> None:
        """Replace `step` in a skipped step: nothing moves, but masks freeze on schedule.

        The next step's constraint makes up for the schedule's progress.
        """
        if self.schedule.freezes_at(step + 1):
            self._apply_schedule(step + 1)

    # Saving

    def _named(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {f"log_alpha.{name}": value for name, value in self.masks.log_alpha.items()}
        return named | {f"multipliers.{name}": value for name, value in self.constraint.multipliers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters, their Adam moments (`NAME.exp_avg`, `NAME.exp_avg_sq`) and `adam_steps` (0-d)."""
        saved: dict[str, Tensor] = {"adam_steps": torch.tensor(0)}
        for name, value in self._named().items():
            saved[name] = value.detach().clone()
            moments = self._adam.state.get(value, {})
            for moment in MOMENTS:
                saved[f"{name}.{moment}"] = moments.get(moment, torch.zeros_like(value)).detach().clone()
            saved["adam_steps"] = torch.tensor(int(moments.get("step", 0)))
        return saved

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Load a saved state.

        Raises:
            CheckpointError: Granularities or sizes differ from this run's.
        """
        named = self._named()
        wanted = {f"{name}{end}": v.shape for name, v in named.items() for end in ("", *(f".{m}" for m in MOMENTS))}
        wanted["adam_steps"] = torch.Size(())
        found = {name: value.shape for name, value in saved.items()}
        if wanted != found:
            differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise CheckpointError(
                f"mask state: the checkpoint's granularities or sizes differ from this run's in {', '.join(differing)}."
                " Use the source, target and prune.granularities with which it was saved."
            )
        steps = float(saved["adam_steps"])
        for name, value in named.items():
            value.copy_(saved[name])
            moments = {moment: saved[f"{name}.{moment}"].to(value).clone() for moment in MOMENTS}
            self._adam.state[value] = {"step": torch.tensor(steps, device=value.device), **moments}


def build_mask_optimizer(
    source: ModelShape,
    target: ModelShape,
    config: PruneConfig,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MaskOptimizer:
    """Build fresh masks with their constraint and optimizer.

    Raises:
        ConfigError: config.granularities do not fit the shapes.
    """
    masks = HardConcreteMasks(source, target, config, seed, device, dtype)
    schedule = SparsitySchedule(config, tuple(masks.specs))
    return MaskOptimizer(masks, build_constraint(masks, schedule), schedule)
