"""The constraint that drives masks to a target shape (Sheared LLaMA, section 2.1): sparsity and its Lagrangian.

Sparsities are fractions of units, as in the published code (the paper writes counts). Every row of log-alpha (a layer,
or the whole model) is constrained apart. The value does not depend on data: it is added once per optimiser step.
Shapes: R rows, N units. Read next: `state.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megashear.masks.hard_concrete import probability_zero


def expected_sparsity(log_alpha_RN: Tensor) -> Tensor:
    """Expected share of zeros in each row: mean of P0 over units. [R, N] -> [R], differentiable."""
    return probability_zero(log_alpha_RN).mean(dim=-1)


def scheduled_target(target: float, step: int, warmup_steps: int) -> float:
    """Target sparsity at a step (from 0): grows linearly and stays at `target` from `warmup_steps` on."""
    return target if step >= warmup_steps else target * (step / warmup_steps)


def lagrangian(
    log_alpha: Mapping[str, Tensor], multipliers: Mapping[str, Tensor], targets: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over granularities of the mean over rows of lambda1 (s - t) + lambda2 (s - t)^2.

    log_alpha: granularity -> [R, N]; multipliers: granularity -> [2], lambda1 and lambda2; targets: granularity -> t.
    Returns (the loss, 0-d, in log-alpha's dtype; granularity -> its expected sparsity, 0-d, detached).
    """
    terms, expected = [], {}
    for name, log_alpha_RN in log_alpha.items():
        sparsity_R = expected_sparsity(log_alpha_RN)
        gap_R = sparsity_R - targets[name]
        lambda1, lambda2 = multipliers[name]
        terms.append((lambda1 * gap_R + lambda2 * gap_R.square()).mean())
        expected[name] = sparsity_R.detach().mean()
    return torch.stack(terms).sum(), expected
