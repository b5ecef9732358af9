"""Hard concrete distribution (Louizos et al. 2018): probability of zero, deterministic masks.

Random samples and their gradients are an op (`megashear.ops.sample_hard_concrete`).
Shape suffixes: R rows with a constraint of their own (layers, or one for the model), N units of a row.
"""

import math

import torch
from torch import Tensor

from megashear.ops.reference import BETA, GAMMA, ZETA

EPS = 1e-6
KAPPA = BETA * math.log(-GAMMA / ZETA)
# The published evaluation mask is sigmoid(0.8 * log_alpha / beta).
SOFT_SLOPE = 0.8 / BETA


def probability_zero(log_alpha: Tensor) -> Tensor:
    """Probability that a sample is exactly 0: sigmoid(kappa - log_alpha), kept off 0 and 1 by 1e-6.

    Source: Louizos et al., equation 12. log_alpha: any shape, floating point.
    Same shape and dtype returned; differentiable.
    """
    return torch.sigmoid(KAPPA - log_alpha).clamp(EPS, 1.0 - EPS)


def places(value_RN: Tensor) -> Tensor:
    """Place of each unit in its row, int64 [R, N], 0 for the largest; of equal units the lower index comes first."""
    order_RN = torch.argsort(value_RN, dim=-1, descending=True, stable=True)
    place_RN = torch.arange(value_RN.shape[-1], device=value_RN.device).expand_as(order_RN)
    return torch.empty_like(order_RN).scatter_(-1, order_RN, place_RN)


def keep_largest(log_alpha_RN: Tensor, kept: int | Tensor) -> Tensor:
    """True at the `kept` largest units of each row; of equal units the lower index is kept.

    kept: one number for all rows, or an integer tensor [R]. Returns bool [R, N].
    """
    return places(log_alpha_RN) < (kept.unsqueeze(-1) if isinstance(kept, Tensor) else kept)


def expected_zeros(log_alpha_RN: Tensor) -> Tensor:
    """Whole number of zeros that each row expects now: round(n - sum(1 - P0)), halves to even. Returns int64 [R]."""
    units = log_alpha_RN.shape[-1]
    open_R = (1.0 - probability_zero(log_alpha_RN.detach().double())).sum(dim=-1)
    return torch.round(units - open_R).long()


@torch.no_grad()
def deterministic(log_alpha_RN: Tensor, zeros_per_row: int | Tensor) -> Tensor:
    """Mask without noise, for evaluation and finalisation: sigmoid(1.2 log_alpha), the smallest of each row exactly 0.

    zeros_per_row: n - n' for a target of n' units, or `expected_zeros` ([R]). Returns [R, N] in the input's dtype. A
    kept unit is never exactly 0, whatever its log_alpha: the masked norm counts what is not 0.
    """
    kept_RN = keep_largest(log_alpha_RN, log_alpha_RN.shape[-1] - zeros_per_row)
    soft_RN = torch.sigmoid(SOFT_SLOPE * log_alpha_RN).clamp(min=torch.finfo(log_alpha_RN.dtype).tiny)
    return torch.where(kept_RN, soft_RN, torch.zeros_like(soft_RN))


@torch.no_grad()
def clamp(log_alpha: Tensor, limit: float) -> Tensor:
    """Projects log_alpha onto [-limit, limit] in place (the fp32 master itself) and returns it."""
    return log_alpha.clamp_(-limit, limit)
