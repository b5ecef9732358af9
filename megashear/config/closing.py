"""How many steps masks close and settle over, what null stands for in that, and what does not fit into the steps.

Read next: `../masks/closing.py` (what happens at each step).
"""

from megashear.config.training_schema import PruneConfig

LAGRANGIAN_WARMUP_SHARE = 0.2
"""Sparsity warm-up under `lagrangian` as a share of the steps, as published (640 of 3200)."""
PROJECTED_WARMUP_SHARE = 0.5
SETTLE_SHARE = 0.1
"""Last steps with fixed masks, as a share of the steps."""


def closing_steps(prune: PruneConfig) -> int:
    """Steps over which target sparsities grow: by default a share of all, and no more than masks are learned in."""
    if prune.sparsity_warmup_steps is not None:
        return prune.sparsity_warmup_steps
    steps = prune.batch.steps
    share = PROJECTED_WARMUP_SHARE if prune.constraint == "projected" else LAGRANGIAN_WARMUP_SHARE
    return min(int(steps * share), steps - (prune.settle_steps or 0))


def settled_steps(prune: PruneConfig) -> int:
    """Last steps with fixed masks: by default a share of all, one at least, and no more than closing leaves."""
    if prune.settle_steps is not None:
        return prune.settle_steps
    steps = prune.batch.steps
    return min(max(1, int(steps * SETTLE_SHARE)), steps - (prune.sparsity_warmup_steps or 0))


def closing_problems(prune: PruneConfig) -> list[str]:
    """Mask schedules that do not fit into the steps, and a granularity that closes twice."""
    problems, steps = [], prune.batch.steps
    sparsity, settled, closing = prune.sparsity_warmup_steps or 0, prune.settle_steps or 0, prune.closing or []
    if sparsity >= steps:
        problems.append(
            f"prune.sparsity_warmup_steps: {sparsity} of {steps} steps leaves none at the full target; "
            "use fewer, or null"
        )
    elif settled >= steps:
        problems.append(f"prune.settle_steps: {settled} of {steps} steps leaves none to learn in; use fewer, or null")
    elif settled and sparsity + settled > steps:
        problems.append(
            f"prune.settle_steps: {settled} and a sparsity warm-up of {sparsity} are more than {steps} steps: masks "
            f"would be fixed before they are at their target; use at most {steps - sparsity}, or null"
        )
    elif settled_steps(prune) >= steps and prune.importance.criterion is None:
        problems.append(
            f"prune.batch.steps: {steps} leaves none in which masks are learned, and prune.importance.criterion is "
            "null, so that units would be kept by chance; use more steps, or name a criterion"
        )
    twice = sorted({name for name in closing if closing.count(name) > 1})
    if twice:
        problems.append(f"prune.closing: {', '.join(twice)} more than once; name each granularity once")
    return problems
