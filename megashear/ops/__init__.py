"""The tensor operations of masked transformers, each with a reference in plain torch and, if built, a compiled kernel.

Every function calls the kernel that was built for the tensor's device and dtype, and otherwise the reference in
`reference.py`, with the same signature and meaning. T: tokens, D: hidden, F: intermediate units, V: vocabulary.

| function | contract |
|---|---|
| `rms_norm(x, weight_D, eps, mask_D)` | RMSNorm over the live dimensions, times weight and mask; x: [.., D] |
| `add_rms_norm(x, branch, branch_mask_D, weight_D, eps, mask_D)` | x + branch * branch_mask and its `rms_norm` |
| `swiglu(gate_up, mask_F)` | silu(gate) * up * mask; [.., 2F] to [.., F] |
| `rope_qkv(qkv_SBR, groups, queries, head_dim, cos, sin)` | split of the QKV product; rotated q, k, and v |
| `attention(q, k, v, head_mask_H, first_BS)` | causal attention within documents, times a mask per query head |
| `cross_entropy_terms(logits, labels, first, columns)` | ln sum exp(logits) and the label's logit per token; fp32 |
| `mask_noise(seed, step, micro_batch, granularity, units)` | counter-based uniform noise; the same bits everywhere |
| `hard_concrete(log_alpha, uniform)` | hard concrete sample in [0, 1], differentiable in log_alpha |
| `sample_hard_concrete(log_alpha, seed, step, ...)` | `hard_concrete` of `mask_noise`, in one launch |
| `live_gather(weight, rows, columns)` | weight[rows][:, columns], a copy |
| `live_add(total, rows, columns, dlive)` | total[rows][:, columns] += dlive, in place |
| `rope_tables`, `apply_rope` | cosine and sine tables, rotation of the last dimension; plain torch |
| `backend`, `attention_choices` | report the implementation of each op and of each attention shape |
| `measure_attention`, `choose_attention_backend` | time the attention backends on a GPU; select one for a shape |

Environment: MEGASHEAR_KERNELS=reference forces the references. MEGASHEAR_ATTENTION selects attention on a GPU: compiled
(the best kernel), reference (torch's), wgmma, tensor_cores or plain.

`distillation_loss.py` implements the distillation loss in plain torch.
"""

from megashear.ops.dispatch import (
    add_rms_norm,
    attention,
    attention_choices,
    backend,
    choose_attention_backend,
    cross_entropy_terms,
    hard_concrete,
    live_add,
    live_gather,
    mask_noise,
    measure_attention,
    rms_norm,
    rope_qkv,
    sample_hard_concrete,
    swiglu,
)
from megashear.ops.kernels.attention_backend import Choice as AttentionChoice
from megashear.ops.kernels.attention_backend import Sample as AttentionSample
from megashear.ops.kernels.attention_backend import Shape as AttentionShape
from megashear.ops.reference import apply_rope, rope_tables

__all__ = [
    "AttentionChoice",
    "AttentionSample",
    "AttentionShape",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_choices",
    "backend",
    "choose_attention_backend",
    "cross_entropy_terms",
    "hard_concrete",
    "live_add",
    "live_gather",
    "mask_noise",
    "measure_attention",
    "rms_norm",
    "rope_qkv",
    "rope_tables",
    "sample_hard_concrete",
    "swiglu",
]
