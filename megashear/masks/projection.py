"""The projected constraint: each row of log-alpha is shifted until its expected sparsity is the scheduled target.

Expected sparsity falls strictly as a row is shifted up, so that the shift is found by bisection, in fp64; no multiplier
is needed, and the target is met at every step. The shift is the projection's own: it changes no difference between
units, which their gradients alone decide. Shapes: R rows, N units. Read next: `state.py`.
"""

import torch
from torch import Tensor

from megashear.masks.hard_concrete import KAPPA

LEAST = 1e-3
"""Sparsity at a target of 0: no finite shift opens every unit with certainty."""
HALVINGS = 60


@torch.no_grad()
def project(log_alpha_RN: Tensor, sparsity: float) -> Tensor:
    """log_alpha shifted row by row so that the mean of sigmoid(kappa - log_alpha) is `sparsity` to 1e-9.

    [R, N] to [R, N] in the input's dtype. sparsity: in [0, 1), taken as at least LEAST.
    """
    wanted = max(sparsity, LEAST)
    a_RN = log_alpha_RN.double()
    # A row whose units were all at the shifted value of its largest or smallest one brackets the solution.
    middle = KAPPA - torch.logit(torch.tensor(wanted, dtype=torch.float64)).item()
    low_R = middle - a_RN.amax(dim=-1, keepdim=True)
    high_R = middle - a_RN.amin(dim=-1, keepdim=True)
    for _ in range(HALVINGS):
        shift_R = (low_R + high_R) / 2
        too_sparse_R = torch.sigmoid(KAPPA - a_RN - shift_R).mean(dim=-1, keepdim=True) > wanted
        low_R = torch.where(too_sparse_R, shift_R, low_R)
        high_R = torch.where(too_sparse_R, high_R, shift_R)
    return (a_RN + (low_R + high_R) / 2).to(log_alpha_RN.dtype)
