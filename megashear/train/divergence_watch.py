"""Warn if masks destroy the model while pruning, and name the granularity at fault.

The smoothed training loss is compared with the source's held-out loss. If it has risen a third of the way to ln V, the
loss of a model that knows nothing, the step's masks are evaluated on a few held-out sequences: all together, to exclude
a batch of hard text, then one granularity at a time. Masks far ahead of their schedule are reported too, before the
loss shows it. Each warning is issued once per phase and changes nothing that is computed.
"""

import logging
import math

import torch

from megashear.config.training_schema import PruneConfig
from megashear.evaluation.heldout import evaluate_heldout
from megashear.evaluation.losses import mean_loss
from megashear.masks.mask_values import Masks
from megashear.train.step import StepResult
from megashear.train.training_phase import Callback, Phase

logger = logging.getLogger(__name__)

MAX_RISE_SHARE = 1.0 / 3.0
"""Rise of the loss that is reported, as a share of the way from the source's loss to ln V."""
MIN_RISE = 0.5
"""Smallest rise that is reported, in nats per token."""
SMOOTHING = 0.8
"""Share of the smoothed loss that is kept at the next step."""
SEQUENCES_PER_DOMAIN = 2
"""Held-out sequences of each domain on which granularities are compared."""
MAX_SPARSITY_AHEAD = 0.1
"""Expected minus scheduled sparsity that is reported, as a share of a granularity's units."""


class DivergenceWatch(Callback):
    """Compare each step of a pruning phase with the source, and warn."""

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Check masks ahead of their schedule when a step is logged, and the loss at every step."""
        counters = phase.counters
        if result.sparsity is not None and (counters.step % phase.logging.interval == 0 or phase.is_finished):
            warn_ahead(phase, result)
        check_divergence(phase, result)


def check_divergence(phase: Phase, result: StepResult) -> None:
    """Warn once if the loss of a pruning phase diverges. A collective if the loss is high: call it on every rank."""
    counters, masks = phase.counters, phase.stepper.masks
    if masks is None or phase.source_loss is None:
        return
    counters.smoothed_loss = average = smoothed(counters.smoothed_loss, result.loss)
    limit = divergence_limit(phase.source_loss, masks.source.vocab_size)
    if average is None or counters.warned_divergence or not average > limit:
        return
    if counters.step < counters.recheck_step:
        return
    heldout, micro_batch = phase.heldout.first(SEQUENCES_PER_DOMAIN), phase.batch.micro_batch

    def loss(mask: Masks | None) -> float:
        return mean_loss(evaluate_heldout(heldout, phase.layout, phase.stepper.weights.chunks, micro_batch, mask))

    seed, step = phase.stepper.seed, counters.step
    with torch.no_grad():
        sampled = masks.sample(seed, step, 0)
    losses = {"none": loss(None)}
    if not is_divergence(phase.source_loss, losses["none"], loss(sampled)):
        counters.recheck_step = 2 * step
        return
    counters.warned_divergence = True
    losses |= {name: loss(mask) for name, mask in masks.single_granularity_masks(seed, step, 0).items()}
    text = divergence_warning(step, average, phase.source_loss, losses, masks.config)
    logger.warning("%s: %s", phase.name, text)


def warn_ahead(phase: Phase, result: StepResult) -> None:
    """Warn once if masks are far ahead of their schedule."""
    if phase.counters.warned_ahead or result.sparsity is None:
        return
    expected = {name: float(value) for name, value in result.sparsity["expected"].items()}
    text = ahead_warning(phase.counters.step, expected, result.sparsity["target"])
    if text is not None:
        phase.counters.warned_ahead = True
        logger.warning("%s: %s", phase.name, text)


def smoothed(average: float | None, loss: float) -> float | None:
    """Update the exponential average of the loss; a non-finite loss (of a skipped step) is ignored."""
    if not math.isfinite(loss):
        return average
    return loss if average is None else SMOOTHING * average + (1.0 - SMOOTHING) * loss


def divergence_limit(source_loss: float, vocab_size: int) -> float:
    """Smoothed loss, in nats per token, above which divergence is suspected."""
    return source_loss + max(MIN_RISE, MAX_RISE_SHARE * (math.log(vocab_size) - source_loss))


def is_divergence(source_loss: float, loss_without_masks: float, loss_with_masks: float) -> bool:
    """Whether weights or masks, and not hard text, explain a high training loss.

    Args:
        source_loss: Held-out loss of the source.
        loss_without_masks, loss_with_masks: Held-out losses of the present weights.
    """
    return max(loss_without_masks - source_loss, loss_with_masks - loss_without_masks) >= MIN_RISE


def divergence_warning(step: int, loss: float, source_loss: float, losses: dict[str, float], prune: PruneConfig) -> str:
    """Text of the warning: the rise of the loss by granularity, and what to change.

    Args:
        step: Optimizer step.
        loss: Smoothed training loss, in nats per token.
        source_loss: Held-out loss of the source.
        losses: Held-out loss under the masks of one granularity at a time, and without masks as `none`.
        prune: Configuration; settings already in use are not advised.
    """
    rises = {name: value - losses["none"] for name, value in losses.items() if name != "none"}
    worst = max(rises, key=lambda name: rises[name])
    parts = ", ".join(f"{name} {rise:+.2f}" for name, rise in sorted(rises.items(), key=lambda item: -item[1]))
    weights = losses["none"] - source_loss
    if weights > rises[worst]:
        cause = "training of the weights is"
        remedy = "Most of the rise is in the weights: stop, and lower `prune.optimizer.learning_rate` or warm up longer"
    else:
        cause = "masks are"
        settings = {
            "`prune.constraint: projected`": prune.constraint != "projected",
            "a `prune.importance.criterion` to start from": prune.importance.criterion is None,
        }
        advice = [text for text, missing in settings.items() if missing] + [
            "a lower `prune.mask_learning_rate`",
            "or a target that prunes less of it",
        ]
        remedy = f"Most of the rise is from {worst}: stop, and use more steps, {', '.join(advice)}"
    return (
        f"step {step}: loss rose from {source_loss:.2f} (source) to {loss:.2f}: {cause} destroying the model. "
        f"Held-out loss increase per granularity, applied one at a time: {parts}; "
        f"weights without masks: {losses['none']:.2f} ({weights:+.2f}). {remedy}"
    )


def ahead_warning(step: int, expected: dict[str, float], target: dict[str, float]) -> str | None:
    """Text of the warning about masks ahead of their schedule, by granularity; None if none is.

    Args:
        step: Optimizer step.
        expected, target: Expected and scheduled sparsity by granularity.
    """
    ahead = [name for name in target if expected[name] - target[name] > MAX_SPARSITY_AHEAD]
    if not ahead:
        return None
    parts = ", ".join(f"{name} sparsity {expected[name]:.0%}, scheduled {target[name]:.0%}" for name in ahead)
    return (
        f"step {step}: masks are ahead of their schedule: {parts}; the model loses more than it has to. Lower "
        "`prune.lambda_learning_rate` or `prune.mask_learning_rate`, cap the multipliers (`prune.lambda1_cap`, "
        "`prune.lambda2_cap`), or use `prune.constraint: projected`, which cannot overshoot"
    )
