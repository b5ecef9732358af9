"""Attention in float64 and how far a kernel may be from it, from the roundings that its formula allows, to first order.

P is the matrix of probabilities, E the product of the mask and the output's gradient. Matrices [B, H, S, S] are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import SMALL, UNIT

MORE = 1.05  # for products of errors


@dataclass(frozen=True)
class Case:
    """One call: q and dout [B, H, S, d], k and v [B, G, S, d], mask [H] or None, first [B, S] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    first: Tensor | None
    dout: Tensor


def bounds(case: Case, exact_out: Tensor, pair: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Largest errors of out, dq, dk, dv and dmask; `pair`: P, dS and E are rounded to the dtype for products."""
    q, dout = case.q.double(), case.dout.double()
    queries, tokens, head_dim = q.shape[1] // case.k.shape[1], q.shape[2], q.shape[3]
    k, v = (x.double().repeat_interleave(queries, dim=1) for x in (case.k, case.v))
    z = torch.ones(q.shape[1], dtype=torch.float64) if case.mask is None else case.mask.double()
    z = z[:, None, None]
    unit, fp32, operand = UNIT[case.q.dtype], UNIT[torch.float32], UNIT[case.q.dtype] if pair else 0.0
    small = SMALL[case.q.dtype]
    scale = head_dim**-0.5
    p, lse = _probabilities(case, q, k, scale)
    # relative error of P: rounded for products; its score, summed over the head size, and logarithm are in fp32
    scores = scale * (q.abs() @ k.abs().mT)
    largest = torch.where(p > 0, scores, 0.0).amax(-1, keepdim=True)
    of_p = operand + fp32 * (2 * (head_dim + 8) * largest + 4 * lse.abs() + tokens + 20)
    of_out = of_p * z.abs() * (p @ v.abs())
    if pair:
        of_out = of_out + small * z.abs() * v.abs().sum(-2, keepdim=True)
    out = MORE * of_out + unit * exact_out.abs() + small

    e, sums = z * dout, fp32 * (tokens + 8)
    de = operand + fp32
    delta = (dout * exact_out).sum(-1, keepdim=True)
    of_dots = fp32 * (head_dim + 4) * (dout * exact_out).abs().sum(-1, keepdim=True)
    of_delta = (dout.abs() * out).sum(-1, keepdim=True) + of_dots
    dp = e @ v.mT
    of_dp = (de + fp32 * (head_dim + 4)) * (e.abs() @ v.abs().mT)
    ds = p * (dp - delta)
    of_ds = p * (of_p * (dp.abs() + delta.abs()) + of_dp + of_delta) + (operand + sums) * ds.abs() + small * pair
    dv = ((of_p + de + sums) * p).mT @ e.abs() + small * pair * dout.abs().sum(-2, keepdim=True)
    dk, dq = scale * of_ds.mT @ q.abs(), scale * of_ds @ k.abs()
    exact = scale * ds @ k, scale * ds.mT @ q, p.mT @ e
    # errors of out are independent roundings: six times their root sum of squares
    of_sum = 6 * (dout * out).square().sum((0, 2, 3)).sqrt() + (of_dots + fp32 * delta.abs()).sum((0, 2, 3))
    of_mask = of_sum / z.flatten().abs().clamp(min=1e-30)
    grouped = [_of_groups(x, queries) for x in (dk, dv, exact[1].abs(), exact[2].abs())]
    return (
        out,
        MORE * dq + unit * exact[0].abs() + small,
        MORE * grouped[0] + unit * grouped[2] + small,
        MORE * grouped[1] + unit * grouped[3] + small,
        MORE * of_mask * (z.flatten() != 0),
    )


def _probabilities(case: Case, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P [B, H, S, S], and the logarithm of the sum of exponentials [B, H, S, 1]."""
    position = torch.arange(q.shape[2])
    seen = (position <= position[:, None]).expand(q.shape[0], 1, -1, -1)
    if case.first is not None:
        seen = seen & (position >= case.first[:, None, :, None])
    scores = (scale * (q @ k.mT)).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1, keepdim=True)


def _of_groups(x: Tensor, queries: int) -> Tensor:
    """Sums over the query heads of each group: [B, H, S, d] to [B, G, S, d]."""
    return x.unflatten(1, (-1, queries)).sum(2)
