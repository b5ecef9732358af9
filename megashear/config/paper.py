"""What `prune.preset: paper` stands for: the published pruning stage, for every key of the section not set by the user.

Source: Sheared LLaMA (arXiv 2310.06694), section 2.1 and appendix A, and the behaviour of its published implementation.
The micro-batch is a matter of the layout and is left alone. Read next: `load.py`, which merges this over the defaults.
"""

import math
from typing import Any

PAPER: dict[str, Any] = {
    "batch": {"steps": 3200, "global_batch": 32, "eval_interval": 50, "eval_sequences": 500},
    "optimizer": {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "schedule": "cosine",
        "warmup_steps": 320,
        "decay_steps": None,
        "min_ratio": 0.1,
    },
    "method": "learned",
    "basis": "source",
    "importance": {"criterion": None, "layer_criterion": None, "spread": 5.0, "batches": 16},
    "refit": None,  # published pruning never cuts at once
    "distillation": {"weight": 0.0, "temperature": 1.0, "until": "end", "chunk": 256},
    "constraint": "lagrangian",
    "mask_learning_rate": 1.0,
    "lambda_learning_rate": 1.0,
    "sparsity_warmup_steps": 640,
    "closing": None,
    "sharpening": 1.0,
    "settle_steps": 0,
    # "group" is the head: the published code knows only heads with keys and values of their own
    "granularities": ["hidden", "group", "intermediate", "layer"],
    "log_alpha_init": 5.0,
    "log_alpha_limit": math.log(100.0),
    "lambda1_cap": None,
    "lambda2_cap": None,
    "live_units": True,  # the published code computes everything; what differs is rounding alone
    "clip": "joint",
    "masking": "published",
}
