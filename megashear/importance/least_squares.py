"""Weighted least squares over tokens that are spread over data-parallel ranks: the change of a matrix that takes most
off what is left. Read next: `refit.py`.
"""

import torch
from torch import Tensor

from megashear.engine.collectives import sum_over_data

RIDGE = 1e-3
"""Weight of the change itself, in mean squares of an input: what the text does not tell stays as it is."""


class LeastSquares:
    """argmin over W of sum_t w_t |r_t - W h_t|^2 + ridge |W|^2, from its normal equations, whose sums are in fp64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram_FF = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross_FD = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, h_NF: Tensor, rest_ND: Tensor, weight_N: Tensor) -> None:
        """Count N tokens: inputs, what is left of the outputs, weights; all in fp32 or fp64."""
        weighted_NF = h_NF * weight_N[:, None]
        self.gram_FF += (weighted_NF.T @ h_NF).double()
        self.cross_FD += (weighted_NF.T @ rest_ND).double()

    def solve(self) -> Tensor:
        """W [D, F] in fp64, the same on all data-parallel ranks (all of them take part); zeros for inputs of zeros, NaN
        where a sum is not finite or rounding has spoilt the system.
        """
        gram_FF, cross_FD = sum_over_data(self.gram_FF), sum_over_data(self.cross_FD)
        if not bool(gram_FF.isfinite().all() and cross_FD.isfinite().all()):
            return torch.full_like(cross_FD.T, torch.nan)
        size = gram_FF.diagonal().mean()
        if not bool(size > 0):
            return torch.zeros_like(cross_FD.T)
        gram_FF.diagonal().add_(RIDGE * size)
        factor_FF, failed = torch.linalg.cholesky_ex(gram_FF)
        return torch.full_like(cross_FD.T, torch.nan) if bool(failed) else torch.cholesky_solve(cross_FD, factor_FF).T
