"""Constraint on the expected sparsity: Lagrangian (Sheared LLaMA, section 2.1) or projection.

Sparsities are fractions of units, as in the published code (the paper uses counts). Every row of log-alpha (a layer, or
the whole model) has its own constraint. The Lagrangian does not depend on data and is added once per optimizer step.

The projection shifts each row by one constant until its expected sparsity equals the scheduled target. Expected
sparsity falls strictly with the shift, so Newton steps with bisection find it.
Shape suffixes: R rows, N units.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megashear.masks.distribution import KAPPA, probability_zero


def expected_sparsity(log_alpha_RN: Tensor) -> Tensor:
    """Expected share of zeros in each row: mean of P0 over units. [R, N] -> [R], differentiable."""
    return probability_zero(log_alpha_RN).mean(dim=-1)


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


MIN_SPARSITY = 1e-3
"""Sparsity that stands for 0 while a row has units to close: no finite shift opens every unit with certainty."""
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
STEPS = {"cpu": 100, "cuda": 24}
"""Steps at most. A CPU stops where it is close enough, after some four; asking a GPU would make the host wait. From a
start that is far off, 24 may leave 1e-3, which the next step's projection takes up.
"""


@torch.no_grad()
def project(log_alpha_RN: Tensor, sparsity: float) -> Tensor:
    """log_alpha shifted row by row so that the mean of sigmoid(kappa - log_alpha) is `sparsity`, to rounding.

    [R, N] to [R, N] in the input's dtype, fp32 or fp64. sparsity: above 0 and below 1.
    """
    # A row whose units were all at the shifted value of its largest or smallest one brackets the solution.
    middle = KAPPA - math.log(sparsity / (1.0 - sparsity))
    low_R = middle - log_alpha_RN.amax(dim=-1, keepdim=True).double()
    high_R = middle - log_alpha_RN.amin(dim=-1, keepdim=True).double()
    shift_R = torch.zeros_like(low_R).clamp(low_R, high_R)
    device = log_alpha_RN.device.type
    for _ in range(STEPS[device]):
        zero_RN = ((KAPPA - shift_R).to(log_alpha_RN.dtype) - log_alpha_RN).sigmoid_()
        mean_R = zero_RN.mean(dim=-1, keepdim=True).double()
        gap_R = mean_R - sparsity
        if device == "cpu" and float(gap_R.abs().max()) <= TOLERANCE[log_alpha_RN.dtype]:
            break
        low_R, high_R = torch.where(gap_R > 0, shift_R, low_R), torch.where(gap_R > 0, high_R, shift_R)
        square_R = torch.linalg.vector_norm(zero_RN, dim=-1, keepdim=True).double().square()
        slope_R = mean_R - square_R / zero_RN.shape[-1]  # the mean of p (1 - p)
        newton_R = shift_R + gap_R / slope_R
        inside_R = (newton_R > low_R) & (newton_R < high_R)  # false where the slope has vanished
        shift_R = torch.where(inside_R, newton_R, (low_R + high_R) / 2)
    return log_alpha_RN + shift_R.to(log_alpha_RN.dtype)
