"""Learning-rate schedules as factors of the peak: linear warm-up, then cosine or warm-up-stable-decay.

With a warm-up the factor of the first step is 0, as in the published runs of Sheared LLaMA.
"""

import math

from megashear.config.training_schema import OptimizerConfig

PRUNE_WARMUP_SHARE = 0.1
PRETRAIN_WARMUP_SHARE = 0.03
WSD_DECAY_SHARE = 0.2


def learning_rate_factor(step: int, steps: int, optimizer: OptimizerConfig, warmup_share: float) -> float:
    """Factor of the peak learning rate at a step (0 .. steps - 1).

    warmup_share: length of the warm-up where the config leaves it open. Cosine falls to `min_ratio` at the last
    step's end; `wsd` stays at 1 and falls linearly to `min_ratio` over `decay_steps`.
    """
    warmup = round(steps * warmup_share) if optimizer.warmup_steps is None else optimizer.warmup_steps
    if step < warmup:
        return step / warmup
    floor = optimizer.min_ratio
    if optimizer.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = optimizer.decay_steps
    if decay is None:
        decay = min(round(steps * WSD_DECAY_SHARE), steps - warmup)
    return 1.0 if step < steps - decay else floor + (1 - floor) * (steps - step) / max(1, decay)
