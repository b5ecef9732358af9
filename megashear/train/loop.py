"""Training loop: draw a batch, step, call the callbacks.

Everything else a phase does (records, evaluation with the mixture update, warnings, checkpoints, stopping) is a
callback. Their order is fixed by `phases/training.py`: a checkpoint is taken after the evaluation of its step, so a
resumed run has the bits and the records of an uninterrupted one.
"""

import logging
from collections.abc import Sequence

from megashear.errors import TrainingError
from megashear.evaluation.losses import Losses
from megashear.mixture.blend import BatchPlan
from megashear.model.micro_batch import micro_batches
from megashear.train.step import StepResult
from megashear.train.training_phase import Callback, Phase

logger = logging.getLogger(__name__)

MAX_NAMED_SAMPLES = 16


def train(phase: Phase, callbacks: Sequence[Callback]) -> Losses:
    """Run the remaining steps of a phase.

    Args:
        phase: Phase at its start, or resumed from a checkpoint.
        callbacks: Called in this order; one of them evaluates the held-out losses.

    Returns:
        Held-out losses at the end of the phase.

    Raises:
        Interrupted: A stop was requested; a checkpoint is saved.
        TrainingError: Too many steps in a row had a non-finite loss or gradient.
    """
    phase.start_clock()
    for callback in callbacks:
        callback.on_start(phase)
    while not phase.is_finished:
        for callback in callbacks:
            callback.before_step(phase)
        result = train_step(phase)
        phase.count_step(result)
        for callback in callbacks:
            callback.after_step(phase, result)
    assert phase.losses is not None
    return phase.losses


def train_step(phase: Phase) -> StepResult:
    """Draw the next global batch and run one optimizer step on this rank's part of it."""
    counters, batch = phase.counters, phase.batch
    exhausted = phase.stream.run_out()
    plan, samples = phase.batches.next()
    for name in sorted(set(phase.stream.run_out()) - set(exhausted)):
        logger.warning(
            "%s: domain %r ran out at step %d after %.0f epochs; the other domains share its weight",
            *(phase.name, name, counters.step + 1, phase.stream.epochs()[name]),
        )
    factor = phase.learning_rate_factor(counters.step)
    separator = phase.batches.loader.separator
    batches = micro_batches(samples, phase.layout, batch.micro_batch, phase.layout.device, separator)
    result = phase.stepper.run(batches, counters.step, factor, factor * phase.learning_rate)
    counters.skipped += result.skipped
    counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if result.skipped else 0
    if counters.skipped_in_a_row >= phase.logging.nonfinite_limit:
        raise TrainingError(
            f"{phase.name}: loss or gradient not finite in {counters.skipped_in_a_row} steps in a row; no weight was "
            f"changed by them. Samples of the last one, step {counters.step}: {_sample_names(phase, plan)}. "
            "Inspect these samples, lower the learning rate, or raise logging.nonfinite_limit"
        )
    return result


def _sample_names(phase: Phase, plan: BatchPlan) -> str:
    names = [f"{phase.stream.names[d]}:{s}" for d, s in zip(plan.domain_B, plan.sample_B, strict=True)]
    return ", ".join(names[:MAX_NAMED_SAMPLES]) + (", ..." if len(names) > MAX_NAMED_SAMPLES else "")
