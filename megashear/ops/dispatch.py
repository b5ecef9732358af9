"""Call the compiled kernel of each op if one was built for the device and dtype, otherwise the reference."""

import torch
from torch import Tensor

from megashear.ops import reference
from megashear.ops.kernels import attention as attention_kernel
from megashear.ops.kernels import attention_backend
from megashear.ops.kernels import cross_entropy as cross_entropy_kernel
from megashear.ops.kernels import hard_concrete as hard_concrete_kernel
from megashear.ops.kernels import live_weight as live_weight_kernel
from megashear.ops.kernels import rms_norm as rms_norm_kernel
from megashear.ops.kernels import rope as rope_kernel
from megashear.ops.kernels import swiglu as swiglu_kernel
from megashear.ops.kernels.attention_backend import Choice as AttentionChoice
from megashear.ops.kernels.attention_backend import Sample as AttentionSample
from megashear.ops.kernels.attention_backend import Shape as AttentionShape
from megashear.ops.kernels.library import compiled_for, serves

_WITH_KERNEL = (
    "cross_entropy_terms",
    "live_gather",
    "live_add",
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "rope_qkv",
    "mask_noise",
    "hard_concrete",
    "sample_hard_concrete",
)
_PLAIN_TORCH = ("rope_tables", "apply_rope")


def backend(device: torch.device | str | None = None) -> dict[str, str]:
    """Return the implementation of each op on a device.

    Args:
        device: Default: the current GPU if one exists, else the CPU.

    Returns:
        Op name to compiled-cpu, compiled-cuda or reference, for fp32, bf16 and fp16; float64 always uses the reference.
        Attention on a GPU is measured for each shape unless the environment selects a backend.
    """
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    compiled = f"compiled-{device.type}" if compiled_for(device) else "reference"
    of_attention = compiled if attention_kernel.attention_serves(device, torch.float32, 64) else "reference"
    if of_attention != "reference" and device.type == "cuda":
        forced = attention_backend.forced()
        if forced is None:
            of_attention = f"{compiled} or reference, by measuring"
        elif forced in ("reference", "compiled"):
            of_attention = {"reference": "reference", "compiled": compiled}[forced]
        else:
            of_attention = f"{compiled} ({forced})"
    return (
        dict.fromkeys(_WITH_KERNEL, compiled) | dict.fromkeys(_PLAIN_TORCH, "reference") | {"attention": of_attention}
    )


def attention_choices() -> list[str]:
    """Return the attention backend and the measured times of each shape used on a GPU, one line per shape."""
    return attention_backend.choices()


def measure_attention(shape: AttentionShape, sample: AttentionSample) -> AttentionChoice | None:
    """Measure the attention backends for a shape on this rank's GPU.

    Returns:
        The fastest backend; None on a CPU, or if the environment selects a backend.
    """
    return attention_backend.measure(shape, sample) if attention_backend.is_measured(shape) else None


def choose_attention_backend(shape: AttentionShape, choice: AttentionChoice) -> None:
    """Use a backend for attention of this shape from now on in this process."""
    attention_backend.set_choice(shape, choice)


def _fp32(vector: Tensor | None) -> Tensor | None:
    """Cast a weight or mask to the dtype of kernels. Autograd casts its gradient back."""
    return None if vector is None else vector.float()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, mask_D: Tensor | None = None) -> Tensor:
    """Compute RMSNorm, over the live dimensions only if a mask is given; see `reference.rms_norm`."""
    if not serves(x):
        return reference.rms_norm(x, weight_D, eps, mask_D)
    out: Tensor = rms_norm_kernel.masked_rms_norm(x, weight_D.float(), _fp32(mask_D), eps)[0]
    return out


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    branch_mask_D: Tensor | None,
    weight_D: Tensor,
    eps: float,
    mask_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute x + branch * branch_mask and its norm in one pass over memory; see `reference.add_rms_norm`."""
    if not serves(x):
        return reference.add_rms_norm(x, branch, branch_mask_D, weight_D, eps, mask_D)
    vectors = _fp32(branch_mask_D), weight_D.float(), _fp32(mask_D)
    out: tuple[Tensor, Tensor] = rms_norm_kernel.add_rms_norm(x, branch, *vectors, eps)[:2]
    return out


def swiglu(gate_up: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up * mask of one [.., 2F] tensor; see `reference.swiglu`."""
    if not serves(gate_up):
        return reference.swiglu(gate_up, mask_F)
    out: Tensor = swiglu_kernel.masked_swiglu(gate_up, _fp32(mask_F))
    return out


def rope_qkv(
    qkv_SBR: Tensor, groups: int, queries: int, head_dim: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the QKV product [S, B, R] and rotate queries and keys; see `reference.rope_qkv`.

    The kernel writes each result to new memory, laid out as [S, B, heads, head_dim], so the product can be freed.
    """
    if not serves(qkv_SBR):
        return reference.rope_qkv(qkv_SBR, groups, queries, head_dim, cos, sin)
    if 2 * cos.shape[-1] != head_dim:
        raise ValueError(f"cos must be [positions, {head_dim} / 2], not {list(cos.shape)}")
    q_SBHd, k_SBGd, v_SBGd = rope_kernel.rope_qkv(qkv_SBR, groups, queries, cos, sin)
    return q_SBHd.permute(1, 2, 0, 3), k_SBGd.permute(1, 2, 0, 3), v_SBGd.permute(1, 2, 0, 3)


def cross_entropy_terms(
    logits: Tensor, labels: Tensor, first: int = 0, columns: int | None = None, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute ln sum exp(logits) and the label's logit of each token; see `reference.cross_entropy_terms`.

    Args:
        logits, labels, first, columns: As for the reference.
        overwrite: Allow the backward pass to write the gradient over the logits, which must not be used afterwards.
    """
    if not serves(logits):
        return reference.cross_entropy_terms(logits, labels, first, columns)
    columns = logits.shape[-1] if columns is None else columns
    terms: tuple[Tensor, Tensor] = cross_entropy_kernel.cross_entropy_terms(logits, labels, first, columns, overwrite)
    return terms


def attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    head_mask_H: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """Compute causal attention with a mask per query head, within documents if given; see `reference.attention`.

    On the CPU the choice between the kernel and torch's attention depends only on the machine and the dtype, so all
    ranks and resumed runs round alike; fp16 is computed in fp32. On a GPU the fastest backend of each shape is used,
    see `kernels/attention_backend.py`.
    """
    inputs = q_BHSd, k_BGSd, v_BGSd, head_mask_H, first_BS
    on_cpu = q_BHSd.device.type == "cpu"
    narrow = on_cpu and q_BHSd.dtype == torch.float16
    dtype = torch.float32 if narrow else q_BHSd.dtype
    if not attention_kernel.attention_serves(q_BHSd.device, dtype, q_BHSd.shape[-1]):
        return reference.attention(*inputs)
    form = "compiled" if on_cpu else attention_backend.serving(q_BHSd, k_BGSd, head_mask_H, first_BS)
    if form == "reference":
        return reference.attention(*inputs)
    if narrow:
        q_BHSd, k_BGSd, v_BGSd = q_BHSd.float(), k_BGSd.float(), v_BGSd.float()
    tiles = "" if form == "compiled" else form
    out: Tensor = attention_kernel.masked_attention(q_BHSd, k_BGSd, v_BGSd, _fp32(head_mask_H), first_BS, tiles)[0]
    return out.half() if narrow else out


def mask_noise(
    seed: int, step: int, micro_batch: int, granularity: int, units: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw uniform fp32 noise [units], the same bits on every device; see `reference.mask_noise`."""
    device = torch.device(device)
    if not compiled_for(device):
        return reference.mask_noise(seed, step, micro_batch, granularity, units, device)
    reference.check_counter(step, micro_batch, granularity)
    uniform: Tensor = hard_concrete_kernel.mask_noise(seed, step, micro_batch, granularity, units, device)
    return uniform


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Sample the hard concrete distribution with given noise; see `reference.hard_concrete`."""
    if log_alpha.dtype != torch.float32 or not serves(log_alpha):
        return reference.hard_concrete(log_alpha, uniform)
    z: Tensor = hard_concrete_kernel.hard_concrete(log_alpha, uniform.float())[0]
    return z


def sample_hard_concrete(log_alpha: Tensor, seed: int, step: int, micro_batch: int, granularity: int) -> Tensor:
    """Draw noise and hard concrete samples in one launch; see `reference.sample_hard_concrete`."""
    if log_alpha.dtype != torch.float32 or not serves(log_alpha):
        return reference.sample_hard_concrete(log_alpha, seed, step, micro_batch, granularity)
    reference.check_counter(step, micro_batch, granularity)
    signed = (seed + 2**63) % 2**64 - 2**63  # as a 64-bit argument of the custom op
    z: Tensor = hard_concrete_kernel.sample_hard_concrete(log_alpha, signed, step, micro_batch, granularity)[0]
    return z


def live_gather(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """Gather the live rows and columns of a weight; see `reference.live_gather`."""
    if not serves(weight):
        return reference.live_gather(weight, rows, columns)
    live: Tensor = live_weight_kernel.live_gather(weight, rows, columns)
    return live


def live_add(total: Tensor, rows: Tensor | None, columns: Tensor | None, dlive: Tensor) -> None:
    """Add the gradient of a live part to the full gradient, in place; see `reference.live_add`."""
    if total.dtype == torch.float32 and serves(dlive):
        live_weight_kernel.live_add(total, rows, columns, dlive)
    else:
        reference.live_add(total, rows, columns, dlive)
