"""Watching a pruning phase's loss: a run whose masks destroy the model says so early, and which granularity does it.

The training loss, smoothed, is compared with the source model's held-out loss. Where it has gone a third of the way
from there to ln V, the loss of a model that knows nothing, the masks are laid over the present weights and evaluated
on a few held-out sequences: all together, which tells a loss that the text is to blame for, then one granularity at a
time. Masks that close far ahead of their schedule are told as well, before the loss shows it. Each is said once a
phase; nothing that is computed changes.
Read next: `loop.py`.
"""

import logging
import math

import torch

from megashear.config.training_schema import PruneConfig
from megashear.evaluation.heldout import evaluate_heldout
from megashear.evaluation.losses import mean_loss
from megashear.masks.mask_values import Masks
from megashear.train.step import StepResult
from megashear.train.training_phase import Phase

logger = logging.getLogger(__name__)

SHARE = 1.0 / 3.0
"""Way from the source's loss to ln V at which a warning is due."""
MIN_RISE = 0.5
"""Nats per token that the loss must have risen in any case."""
SMOOTHING = 0.8
"""Share of the smoothed loss that the next step keeps."""
SEQUENCES = 2
"""Held-out sequences a domain by which granularities are told apart."""
AHEAD = 0.1
"""Share of a granularity's units that may be closed beyond what the schedule asks for."""


def check_divergence(phase: Phase, result: StepResult) -> None:
    """Warn once where a pruning phase's loss says that its masks destroy the model, and which of them (every rank)."""
    counters, masks = phase.counters, phase.stepper.masks
    if masks is None or phase.source_loss is None:
        return
    counters.smoothed_loss = average = smoothed(counters.smoothed_loss, result.loss)
    if average is None or counters.warned or not average > limit(phase.source_loss, masks.source.vocab_size):
        return
    if counters.step < counters.recheck_step:
        return
    few, batch = phase.heldout.first(SEQUENCES), phase.batch.micro_batch

    def loss(mask: Masks | None) -> float:
        return mean_loss(evaluate_heldout(few, phase.layout, phase.stepper.weights.chunks, batch, mask))

    seed, step = phase.stepper.seed, counters.step
    with torch.no_grad():
        together = masks.sample(seed, step, 0)
    means = {"open": loss(None)}
    if not confirmed(phase.source_loss, means["open"], loss(together)):
        counters.recheck_step = 2 * step
        return
    counters.warned = True
    means |= {name: loss(mask) for name, mask in masks.alone(seed, step, 0).items()}
    logger.warning("%s: %s", phase.name, verdict(counters.step, average, phase.source_loss, means, masks.config))


def warn_ahead(phase: Phase, expected: dict[str, float], target: dict[str, float]) -> None:
    """Warn once where masks close far ahead of their schedule."""
    if phase.counters.ahead:
        return
    text = ahead(phase.counters.step, expected, target)
    if text is not None:
        phase.counters.ahead = True
        logger.warning("%s: %s", phase.name, text)


def smoothed(average: float | None, loss: float) -> float | None:
    """The exponential average after one more loss; a loss that is not finite (its step was skipped) does not enter."""
    if not math.isfinite(loss):
        return average
    return loss if average is None else SMOOTHING * average + (1.0 - SMOOTHING) * loss


def limit(source_loss: float, vocab_size: int) -> float:
    """The smoothed loss, in nats per token, above which a model counts as being destroyed."""
    return source_loss + max(MIN_RISE, SHARE * (math.log(vocab_size) - source_loss))


def confirmed(source_loss: float, open_loss: float, masked_loss: float) -> bool:
    """Whether a high training loss is the masks' or the weights', and not of harder text than the held-out one's.

    open_loss, masked_loss: held-out losses of the present weights without and with the step's masks.
    """
    return max(open_loss - source_loss, masked_loss - open_loss) >= MIN_RISE


def verdict(step: int, loss: float, source_loss: float, means: dict[str, float], prune: PruneConfig) -> str:
    """The warning. means: mean held-out loss with the masks of one granularity alone, and with none under `open`;
    prune: what is not set already is advised.
    """
    rises = {name: mean - means["open"] for name, mean in means.items() if name != "open"}
    worst = max(rises, key=lambda name: rises[name])
    parts = ", ".join(f"{name} {rise:+.2f}" for name, rise in sorted(rises.items(), key=lambda item: -item[1]))
    weights = means["open"] - source_loss
    if weights > rises[worst]:
        cause = "the weights' training is"
        remedy = "Most of it is in the weights: stop, and lower `prune.optimizer.learning_rate` or warm it up longer"
    else:
        cause = "the masks are"
        others = {
            "`prune.constraint: projected`": prune.constraint != "projected",
            "a `prune.importance.criterion` to start from": prune.importance.criterion is None,
        }
        advice = [text for text, lacks in others.items() if lacks] + [
            "a lower `prune.mask_learning_rate`",
            "or a target that closes less of it",
        ]
        remedy = f"Most of it is {worst}: stop, and give the masks more steps, {', '.join(advice)}"
    return (
        f"step {step}: the loss is {loss:.2f}, the source's was {source_loss:.2f}: {cause} destroying the model. "
        f"What each granularity's masks do to the held-out loss alone: {parts}; the weights without masks are at "
        f"{means['open']:.2f} ({weights:+.2f}). {remedy}"
    )


def ahead(step: int, expected: dict[str, float], target: dict[str, float]) -> str | None:
    """The warning of masks that are closed beyond their schedule, by granularity; None where none is by AHEAD."""
    far = [name for name in target if expected[name] - target[name] > AHEAD]
    if not far:
        return None
    parts = ", ".join(f"{name} {expected[name]:.0%} closed, {target[name]:.0%} asked for" for name in far)
    return (
        f"step {step}: masks close ahead of their schedule: {parts}; the model loses more than it has to. Lower "
        "`prune.lambda_learning_rate` or `prune.mask_learning_rate`, cap the linear multiplier (`prune.lambda1_cap`; "
        "the quadratic one brakes), or use `prune.constraint: projected`, which cannot overshoot"
    )
