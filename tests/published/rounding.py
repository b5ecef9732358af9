"""What the published code computes in float32, all else being float64: variances, softmax, the noise's logit.

With these in place of this package's float64 nothing is left to differ: the forward pass agrees to 1e-15. The last bits
of a float32 softmax hang on the host's vector instructions, so `same_bits` says first whether this host has the same.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from megashear import ops

# SHA-256 of a float32 softmax, computed where the forward pass below agrees with the published arrays to 1e-15.
DIGEST = "1962c580005f5f482615f09d23bb5a42e5ba180203ceed738f15dd7278314b5d"


def rms_norm(x: Tensor, weight: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    live = x if mask is None else x[..., mask != 0]
    out = weight * (x * torch.rsqrt(live.float().square().mean(-1, keepdim=True) + eps))
    return out if mask is None else out * mask


def add_rms_norm(
    x: Tensor, branch: Tensor, branch_mask: Tensor | None, weight: Tensor, eps: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    total = x + (branch if branch_mask is None else branch * branch_mask)
    return total, rms_norm(total, weight, eps, mask)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """Multi-head and across documents only."""
    assert first is None
    score = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
    share = score.masked_fill(future, torch.finfo(score.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype)
    out = share @ v
    return out if mask is None else out * mask[:, None, None]


def noise(uniform: Tensor) -> Tensor:
    """Float64 numbers with the published float32 logit: two logarithms, each rounded, and their rounded difference."""
    u = uniform.float()
    logit = u.double().log().float() - (1 - u).double().log().float()
    return torch.sigmoid(logit.double())


def same_bits() -> bool:
    """Whether this host's float32 softmax of causal rows has the last bits that it had for the published arrays."""
    exact = (torch.arange(64 * 24 * 24).mul(2971) % 4093).sub(2046).div(2048).view(-1, 24, 24)
    future = torch.ones(24, 24, dtype=torch.bool).triu(1)
    shares = exact.masked_fill(future, -3e38).softmax(-1)
    return hashlib.sha256(shares.numpy().tobytes()).hexdigest() == DIGEST


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "rms_norm", rms_norm)
    monkeypatch.setattr(ops, "add_rms_norm", add_rms_norm)
    monkeypatch.setattr(ops, "attention", attention)
