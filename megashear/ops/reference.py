"""Reference of each op in plain torch: masked norm, SwiGLU and attention, RoPE, mask noise, hard concrete samples.

Compiled kernels are tested against these functions, which are also used if no kernel was built. Arithmetic is at least
fp32 (float64 stays float64), nothing synchronizes with the device, and autograd of these functions defines the
gradients. Shape suffixes: T tokens, D hidden, F intermediate units, B batch, H query heads, G key/value groups, S
positions.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megashear.config.model_shape import RopeScaling

BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1
"""Temperature and stretch of the hard concrete distribution (Louizos et al. 2018; Sheared LLaMA, section 2.1)."""

NOISE_FLOOR = 17
"""Smallest numerator over 2^24 of the mask noise, the first odd one above 1e-6; the largest is 2^24 - 17."""


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, mask_D: Tensor | None = None) -> Tensor:
    """Compute RMSNorm; with a mask, over live dimensions only and masked (Sheared LLaMA's N_w).

    out = weight * mask * x * rsqrt(sum of x^2 over mask != 0 / #(mask != 0) + eps)

    The normalised x is rounded to x's dtype before the products, as in Hugging Face's LLaMA, so a mask of ones gives
    the same bits as no mask. A mask of zeros gives zeros. The mask's gradient comes only from the product, not from the
    selection.

    Args:
        x: [.., D] of any floating dtype.
        weight_D: [D].
        eps: Added to the mean square.
        mask_D: [D] or None.

    Returns:
        A tensor of x's shape and dtype.
    """
    wide = _accumulation_dtype(x)
    x_wide = x.to(wide)
    if mask_D is None:
        mean_square = x_wide.square().mean(-1, keepdim=True)
    else:
        live_D = mask_D.detach() != 0
        square = torch.where(live_D, x_wide, 0.0).square().sum(-1, keepdim=True)
        mean_square = square / live_D.sum().clamp(min=1)
    out = weight_D.to(wide) * (x_wide * torch.rsqrt(mean_square + eps)).to(x.dtype)
    if mask_D is not None:
        out = out * mask_D.to(wide)
    return out.to(x.dtype)


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    branch_mask_D: Tensor | None,
    weight_D: Tensor,
    eps: float,
    mask_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute x + branch * branch_mask, rounded once to x's dtype, and its `rms_norm`.

    Args:
        x: Residual stream, [.., D] of any floating dtype.
        branch: Output of a block, of x's shape and dtype.
        branch_mask_D, weight_D, mask_D: [D]; masks may be None.
        eps: Added to the mean square.

    Returns:
        The residual stream and its norm, of x's shape and dtype.
    """
    wide = _accumulation_dtype(x)
    added = branch.to(wide) if branch_mask_D is None else branch.to(wide) * branch_mask_D.to(wide)
    total = (x.to(wide) + added).to(x.dtype)
    return total, rms_norm(total, weight_D, eps, mask_D)


def swiglu(gate_up: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up * mask; gate is the first half of the last dimension, up the second (Shazeer 2020).

    gate_up: [.., 2F] of any floating dtype; mask_F: [F]. Returns [.., F] in gate_up's dtype, rounded once.
    """
    gate, up = gate_up.to(_accumulation_dtype(gate_up)).chunk(2, dim=-1)
    out = F.silu(gate) * up
    if mask_F is not None:
        out = out * mask_F.to(out.dtype)
    return out.to(gate_up.dtype)


def cross_entropy_terms(
    logits: Tensor, labels: Tensor, first: int = 0, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ln sum exp(logits) and the label's logit of each token over a part of the vocabulary.

    Over the whole vocabulary the cross entropy in nats is their difference.

    Args:
        logits: [.., V] for entries first .. first + V - 1, of any floating dtype.
        labels: int64 [..].
        first: First vocabulary entry of this part.
        columns: Number of leading columns that count, the rest is padding. None: all.

    Returns:
        Two tensors [..] in at least fp32. The second is 0 for labels outside of this part.
    """
    real = logits[..., :columns].to(_accumulation_dtype(logits))
    column = labels - first
    inside = (column >= 0) & (column < real.shape[-1])
    label_logit = logits.gather(-1, torch.where(inside, column, 0).unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(real, -1), torch.where(inside, label_logit.to(real.dtype), 0.0)


def _inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the rotary frequencies, fp32 [head_dim / 2], rescaled as in Llama 3 if `scaling` is given."""
    frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if scaling is None:
        return frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    scaled = torch.where(wavelength > context / low, frequency / scaling.factor, blended)
    return torch.where(wavelength < context / high, frequency, scaled)


def rope_tables(
    head_dim: int, positions: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the rotary angles of positions 0 to `positions` - 1 (Su et al. 2021).

    Returns:
        Two fp32 tensors [positions, head_dim / 2] on `device`, computed on the CPU: the same bits on every device.
    """
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * _inverse_frequencies(head_dim, theta, scaling)
    return angle.cos().to(device), angle.sin().to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of the last dimension, the rotate-half convention of Hugging Face's LLaMA.

    x: [.., S, head_dim]; cos, sin: [positions, head_dim / 2] with positions >= S, of which the first S are used, or any
    shape that broadcasts to x's halves. Returns x's shape and dtype; computed in at least fp32.
    """
    if cos.dim() == 2 and cos.shape[0] > x.shape[-2]:
        cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    first, second = x.to(_accumulation_dtype(x)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_qkv(
    qkv_SBR: Tensor, groups: int, queries: int, head_dim: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused QKV product and rotate queries and keys by their positions.

    Args:
        qkv_SBR: [S, B, groups * (queries + 2) * head_dim]; each group holds its query heads, its key, its value.
        groups: Key/value groups.
        queries: Query heads per group.
        head_dim: Head size.
        cos, sin: fp32 [positions, head_dim / 2], positions >= S.

    Returns:
        Queries [B, groups * queries, S, head_dim], keys and values [B, groups, S, head_dim], in qkv's dtype.
    """
    x_SBGrd = qkv_SBR.unflatten(2, (groups, queries + 2, head_dim))
    q_SBHd, k_SBGd, v_SBGd = x_SBGrd[..., :-2, :].flatten(2, 3), x_SBGrd[..., -2, :], x_SBGrd[..., -1, :]
    q_BHSd, k_BGSd, v_BGSd = (x.permute(1, 2, 0, 3) for x in (q_SBHd, k_SBGd, v_SBGd))
    return apply_rope(q_BHSd, cos, sin), apply_rope(k_BGSd, cos, sin), v_BGSd


def attention(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    head_mask_H: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """Compute causal softmax(q k^T / sqrt(head_dim)) v, times the mask of each query head, within documents if given.

    A head whose mask is 0 is skipped: its output and all its gradients are 0, including that of its mask. The hard
    concrete sample has slope 0 there, so no gradient is lost.

    Args:
        q_BHSD: [B, H, S, head_dim].
        k_BGSD, v_BGSD: [B, G, S, head_dim]; H is a multiple of G, and query head h reads group h * G // H.
        head_mask_H: [H] or None.
        first_BS: int32 [B, S] or None; position i attends to positions first[i] to i.

    Returns:
        [B, H, S, head_dim] in q's dtype.
    """
    grouped = q_BHSD.shape[1] != k_BGSD.shape[1]
    visible_BHSS = None
    if first_BS is not None:
        position_S = torch.arange(q_BHSD.shape[2], device=q_BHSD.device)
        visible_BSS = (position_S <= position_S[:, None]) & (position_S >= first_BS[:, :, None])
        visible_BHSS = visible_BSS[:, None]
    out = F.scaled_dot_product_attention(
        q_BHSD, k_BGSD, v_BGSD, attn_mask=visible_BHSS, is_causal=visible_BHSS is None, enable_gqa=grouped
    )
    if head_mask_H is None:
        return out
    wide = _accumulation_dtype(out)
    live_H11 = (head_mask_H.detach() != 0)[:, None, None]
    masked = out.to(wide) * head_mask_H.to(wide)[:, None, None]
    return torch.where(live_H11, masked, 0.0).to(out.dtype)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Compute Philox 4x32-10, the counter-based generator of Salmon et al. (SC 2011).

    counter: uint64 [4, blocks]; key: two integers. Returns uint64 [4, blocks]. All words are below 2^32.
    """
    low32 = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0 = np.uint64((key[0] + i * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + i * 0xBB67AE85) & 0xFFFFFFFF)
        product0, product2 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product2 >> np.uint64(32)) ^ c1 ^ k0, product2 & low32
        c2, c3 = (product0 >> np.uint64(32)) ^ c3 ^ k1, product0 & low32
    return np.stack((c0, c1, c2, c3))


def mask_noise(
    seed: int, step: int, micro_batch: int, granularity: int, units: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw uniform noise for one granularity, a pure function of its arguments with the same bits everywhere.

    Returns fp32 [units] on `device`, strictly inside (1e-6, 1 - 1e-6). Unit i takes word i % 4 of the Philox block
    whose counter is (i // 4, granularity, micro_batch, step) and whose key is (seed mod 2^32, seed div 2^32 mod 2^32).
    A word w becomes n / 2^24 with the odd n = 2 (w >> 9) + 1 clipped to [17, 2^24 - 17]; n / 2^24 and 1 - n / 2^24 are
    exact in fp32.

    Raises:
        ValueError: If step, micro_batch or granularity is outside [0, 2^32).
    """
    check_counter(step, micro_batch, granularity)
    blocks = -(-units // 4)
    counter = np.empty((4, blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1], counter[2], counter[3] = granularity, micro_batch, step
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).T.reshape(-1)[:units]
    numerator = np.clip(2 * (words >> np.uint64(9)).astype(np.int64) + 1, NOISE_FLOOR, 2**24 - NOISE_FLOOR)
    return torch.from_numpy(numerator.astype(np.float32) * np.float32(2.0**-24)).to(device)


def check_counter(step: int, micro_batch: int, granularity: int) -> None:
    """Raise ValueError unless each of the noise's three indices fits a 32-bit word of the counter."""
    for name, value in (("step", step), ("micro_batch", micro_batch), ("granularity", granularity)):
        if not 0 <= value < 2**32:
            raise ValueError(f"mask noise: {name} is {value}, outside [0, 2^32)")


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Sample the hard concrete distribution of each unit, in [0, 1] with exact zeros and ones (Louizos et al. 2018).

    log_alpha, uniform: one shape, uniform inside (0, 1). Returns that shape in log_alpha's dtype. The gradient to
    log_alpha is (zeta - gamma) s (1 - s) / beta strictly inside (0, 1) and exactly 0 at the bounds; uniform has none.
    """
    wide = _accumulation_dtype(log_alpha)
    u = uniform.detach().to(wide)
    s = torch.sigmoid((u.log() - torch.log1p(-u) + log_alpha.to(wide)) / BETA)
    stretched = s * (ZETA - GAMMA) + GAMMA
    inside = (stretched > 0) & (stretched < 1)
    return torch.where(inside, stretched, stretched.detach().clamp(0.0, 1.0)).to(log_alpha.dtype)


def sample_hard_concrete(log_alpha: Tensor, seed: int, step: int, micro_batch: int, granularity: int) -> Tensor:
    """Compute `hard_concrete` with `mask_noise` of the same indices, units in row-major order of log_alpha.

    The kernel computes noise, sample and slope in one launch. Returns log_alpha's shape and dtype.
    """
    noise = mask_noise(seed, step, micro_batch, granularity, log_alpha.numel(), log_alpha.device)
    return hard_concrete(log_alpha, noise.view(log_alpha.shape))


def live_gather(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """Copy the live part of a weight, weight[rows][:, columns].

    weight: [R, C]; rows, columns: int64, strictly ascending, None for all. Returns [rows, columns].
    """
    live = weight if rows is None else weight.index_select(0, rows)
    return live.clone() if columns is None and rows is None else live if columns is None else live[:, columns]


def live_add(total: Tensor, rows: Tensor | None, columns: Tensor | None, dlive: Tensor) -> None:
    """Add the gradient of a live part to the full gradient in place: total[rows][:, columns] += dlive.

    total: [R, C]; dlive: [rows, columns]; indices as in `live_gather`.
    """
    if rows is not None and columns is not None:
        total[rows[:, None], columns] += dlive
    elif rows is not None:
        total[rows] += dlive
    elif columns is not None:
        total[:, columns] += dlive
    else:
        total += dlive
