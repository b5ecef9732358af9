"""What a masked RMSNorm kernel may be away from float64, by the roundings of its formula."""

from typing import NamedTuple

import torch
from torch import Tensor

from .agreement import SMALL, UNIT

EPS = 1e-5


class NormBounds(NamedTuple):
    """Largest errors of the norm and of its gradients, float64 in their shapes."""

    out: Tensor
    dx: Tensor
    dweight: Tensor
    dmask: Tensor


def norm_bounds(x: Tensor, weight: Tensor, mask: Tensor | None, dout: Tensor, exact: dict[str, Tensor]) -> NormBounds:
    """Bounds for x [tokens, hidden] in its dtype. exact: the float64 `out` and `dx`."""
    tokens, hidden = x.shape
    unit, single = UNIT[x.dtype], UNIT[torch.float32]
    # fp32 sum of `hidden` squares of one sign: its relative error is below (hidden + 10) roundings, halved by the root
    scaling = (hidden + 20) * single
    wide, weight = x.double(), weight.double()
    m = torch.ones_like(weight) if mask is None else mask.double()
    live = m != 0
    count = live.sum().clamp(min=1)
    r = (torch.where(live, wide, 0.0).square().sum(-1, keepdim=True) / count + EPS).rsqrt()
    dh = dout.double().abs() * (weight * m).abs()
    pull = live * wide.abs() * r**3 / count * (dh * wide.abs()).sum(-1, keepdim=True)
    # h is rounded to the dtype before the products; fp16 has no numbers between 0 and 2^-24
    spacing = SMALL[x.dtype]
    rounding = spacing * (1 + (weight * m).abs())
    # both vectors' gradients are sums over tokens of dout * h
    columns = (dout.double() * wide * r).abs().sum(0)
    column = (unit + (tokens + 20) * single + scaling) * columns + spacing * dout.double().abs().sum(0) + spacing
    return NormBounds(
        out=(2.01 * unit + scaling) * exact["out"].abs() + rounding,
        dx=unit * exact["dx"].abs() + 3 * scaling * (r * dh + pull) + spacing,
        dweight=column * m.abs() + spacing,
        dmask=column * weight.abs() + spacing,
    )
