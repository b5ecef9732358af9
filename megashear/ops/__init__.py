"""The room of tensor operations that masks need: each has a meaning in plain torch and, where it was built, a kernel.

Read next: `reference.py`, the meaning of every op.
"""

from megashear.ops.reference import (
    apply_rope,
    attention,
    hard_concrete,
    mask_noise,
    rms_norm,
    rope_tables,
    sample_hard_concrete,
    swiglu,
)

__all__ = [
    "apply_rope",
    "attention",
    "hard_concrete",
    "mask_noise",
    "rms_norm",
    "rope_tables",
    "sample_hard_concrete",
    "swiglu",
]
