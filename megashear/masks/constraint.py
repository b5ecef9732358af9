"""The sparsity constraint on masks: projection of log-alpha, or the Lagrangian of Sheared LLaMA (section 2.1).

Sparsities are fractions of units, as in the published code (the paper writes counts). Each row of log-alpha (a layer,
or the whole model) has a constraint of its own. The constraint does not depend on data and applies once per step.
Shape suffixes: R rows, N units.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from megashear.masks.hard_concrete_masks import FROZEN_LOG_ALPHA, KAPPA, HardConcreteMasks, clamp, probability_zero
from megashear.masks.sparsity_schedule import SparsitySchedule

MIN_SPARSITY = 1e-3
"""Smallest sparsity to project onto: no finite shift makes the probability of zeros exactly 0."""
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
MAX_STEPS = {"cpu": 100, "cuda": 24}
"""Newton steps at most. A CPU stops at the tolerance, after about four; a GPU does not check, which would synchronize.
From a distant start, 24 steps may leave an error of 1e-3, which the next step's projection removes.
"""
WARM_START_MIN_LOG_ALPHA = 2.0
"""Log-alpha of the worst unit at a warm start under `lagrangian`: 3 % of its samples are 0."""


def expected_sparsity(log_alpha_RN: Tensor) -> Tensor:
    """Expected share of zeros in each row: mean of P0 over units. [R, N] -> [R], differentiable."""
    return probability_zero(log_alpha_RN).mean(dim=-1)


def lagrangian(
    log_alpha: Mapping[str, Tensor], multipliers: Mapping[str, Tensor], targets: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over granularities of the mean over rows of lambda1 (s - t) + lambda2 (s - t)^2.

    Args:
        log_alpha: Granularity -> [R, N].
        multipliers: Granularity -> [2], lambda1 and lambda2.
        targets: Granularity -> target sparsity t.

    Returns:
        The loss (0-d, in log-alpha's dtype), and granularity -> its expected sparsity (0-d, detached).
    """
    terms, expected = [], {}
    for name, log_alpha_RN in log_alpha.items():
        sparsity_R = expected_sparsity(log_alpha_RN)
        gap_R = sparsity_R - targets[name]
        lambda1, lambda2 = multipliers[name]
        terms.append((lambda1 * gap_R + lambda2 * gap_R.square()).mean())
        expected[name] = sparsity_R.detach().mean()
    return torch.stack(terms).sum(), expected


@torch.no_grad()
def project(log_alpha_RN: Tensor, sparsity: float) -> Tensor:
    """Shift each row so that the mean of sigmoid(kappa - log_alpha) is `sparsity`, up to rounding.

    Expected sparsity falls strictly as a row is shifted up. Newton's method finds the shift, with bisection for steps
    that leave the bracket. A shift changes no difference between units.

    Args:
        log_alpha_RN: [R, N], fp32 or fp64.
        sparsity: Between 0 and 1, both excluded.

    Returns:
        Shifted log-alpha, [R, N] in the input's dtype.
    """
    # Rows with every unit at the shifted largest or smallest value bracket the solution.
    middle = KAPPA - math.log(sparsity / (1.0 - sparsity))
    low_R = middle - log_alpha_RN.amax(dim=-1, keepdim=True).double()
    high_R = middle - log_alpha_RN.amin(dim=-1, keepdim=True).double()
    shift_R = torch.zeros_like(low_R).clamp(low_R, high_R)
    device = log_alpha_RN.device.type
    for _ in range(MAX_STEPS[device]):
        zero_RN = ((KAPPA - shift_R).to(log_alpha_RN.dtype) - log_alpha_RN).sigmoid_()
        mean_R = zero_RN.mean(dim=-1, keepdim=True).double()
        gap_R = mean_R - sparsity
        if device == "cpu" and float(gap_R.abs().max()) <= TOLERANCE[log_alpha_RN.dtype]:
            break
        low_R, high_R = torch.where(gap_R > 0, shift_R, low_R), torch.where(gap_R > 0, high_R, shift_R)
        square_R = torch.linalg.vector_norm(zero_RN, dim=-1, keepdim=True).double().square()
        slope_R = mean_R - square_R / zero_RN.shape[-1]  # the mean of p (1 - p)
        newton_R = shift_R + gap_R / slope_R
        inside_R = (newton_R > low_R) & (newton_R < high_R)  # false if the slope has vanished
        shift_R = torch.where(inside_R, newton_R, (low_R + high_R) / 2)
    return log_alpha_RN + shift_R.to(log_alpha_RN.dtype)


class Constraint(nn.Module, ABC):
    """Drives the expected sparsity of masks to the schedule's targets.

    Attributes:
        multipliers: Granularity -> [2], lambda1 and lambda2. The projected constraint does not use them; they stay 0
            and keep the checkpoint's schema the same for both.
    """

    def __init__(self, masks: HardConcreteMasks, schedule: SparsitySchedule) -> None:
        super().__init__()
        self.schedule = schedule
        parameters = nn.ParameterDict()
        for name, value in masks.log_alpha.items():
            parameters[name] = nn.Parameter(value.detach().new_zeros(2))
        self.multipliers = cast("Mapping[str, nn.Parameter]", parameters)

    @abstractmethod
    def loss(self, masks: HardConcreteMasks, step: int) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """The constraint's loss at a step.

        Returns:
            The loss (0-d, differentiable if there are multipliers to learn), and
            {"expected": {granularity: 0-d}, "target": {granularity: float}}, both sparsities.
        """

    @abstractmethod
    def apply_to(self, masks: HardConcreteMasks, step: int) -> None:
        """Change log-alpha in place to what the constraint requires at a step."""

    def clamp_multipliers(self) -> None:
        """Apply the caps of the multipliers."""

    @abstractmethod
    def warm_start_range(self) -> tuple[float, float]:
        """Log-alpha of the worst and of the best unit of a row at a warm start."""


class ProjectedConstraint(Constraint):
    """Shifts each row of log-alpha onto the scheduled sparsity at every step; the loss is 0."""

    def loss(self, masks: HardConcreteMasks, step: int) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """A loss of 0, without gradients, and the sparsities."""
        expected = {s.name: expected_sparsity(masks.rows(s).detach()).mean() for s in masks.specs}
        zero = next(iter(self.multipliers.values())).detach().new_zeros(())
        return zero, {"expected": expected, "target": self.schedule.targets(step)}

    @torch.no_grad()
    def apply_to(self, masks: HardConcreteMasks, step: int) -> None:
        """Project every row onto the scheduled sparsity; granularities that keep all units stay nonzero."""
        targets = self.schedule.targets(step)
        for spec in masks.specs:
            rows = masks.rows(spec)
            if spec.zeros_per_row:
                rows.copy_(project(rows, max(targets[spec.name], min(MIN_SPARSITY, spec.target_sparsity))))
            else:
                rows.fill_(FROZEN_LOG_ALPHA)

    def warm_start_range(self) -> tuple[float, float]:
        """-+ `importance.spread`; the projection then shifts each row."""
        spread = self.schedule.config.importance.spread
        return -spread, spread


class LagrangianConstraint(Constraint):
    """The published constraint: multipliers ascend on the gap between expected and target sparsity."""

    def loss(self, masks: HardConcreteMasks, step: int) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """The Lagrangian and the sparsities."""
        targets = self.schedule.targets(step)
        loss, expected = lagrangian({s.name: masks.rows(s) for s in masks.specs}, self.multipliers, targets)
        return loss, {"expected": expected, "target": targets}

    @torch.no_grad()
    def apply_to(self, masks: HardConcreteMasks, step: int) -> None:
        """Clamp log-alpha to `prune.log_alpha_limit`."""
        if self.schedule.config.log_alpha_limit is not None:
            for value in masks.log_alpha.values():
                clamp(value, self.schedule.config.log_alpha_limit)

    @torch.no_grad()
    def clamp_multipliers(self) -> None:
        """Clamp the multipliers to `prune.lambda1_cap` and `prune.lambda2_cap`."""
        # lambda1 is negative while sparsity must grow and positive while it must fall.
        config = self.schedule.config
        for pair in self.multipliers.values():
            for value, cap in zip(pair, (config.lambda1_cap, config.lambda2_cap), strict=True):
                if cap is not None:
                    value.clamp_(-cap, cap)

    def warm_start_range(self) -> tuple[float, float]:
        """Up to `prune.log_alpha_limit`, with every unit above 0."""
        config = self.schedule.config
        if config.log_alpha_limit is None:
            high = max(WARM_START_MIN_LOG_ALPHA, config.log_alpha_init)
        else:
            high = config.log_alpha_limit
        return min(WARM_START_MIN_LOG_ALPHA, high / 2), high  # a low limit keeps the order of the scores too


def build_constraint(masks: HardConcreteMasks, schedule: SparsitySchedule) -> Constraint:
    """The constraint that `prune.constraint` names, with multipliers of 0."""
    return ProjectedConstraint(masks, schedule) if schedule.projected else LagrangianConstraint(masks, schedule)
