"""The training loop of a phase: evaluate and re-weight domains, draw a batch, step, log, save, stop when asked.

Key properties: the order is fixed (step, records, evaluation, checkpoint, stop), and a checkpoint is taken after the
evaluation of its step, so that a run resumed from any checkpoint has the bits and the records of the unbroken one. The
loop knows no files: it is given a `save`. Read next: `phase.py`, `step.py`, `evaluate.py`.
"""

import logging
import time
from collections.abc import Callable

import torch

from megashear import ops
from megashear.engine.collectives import max_over_world
from megashear.engine.layout import Layout
from megashear.errors import Interrupted, TrainingError
from megashear.evaluation.heldout import evaluate_sequences
from megashear.evaluation.losses import Losses, summarise
from megashear.mixture.blend import BatchPlan
from megashear.model.micro_batch import micro_batches
from megashear.processes import StopRequest
from megashear.train.divergence_watch import check_divergence, warn_ahead
from megashear.train.learning_rate import learning_rate_factor
from megashear.train.step import StepResult
from megashear.train.teacher import stop_if_student_is_better
from megashear.train.training_phase import Counters, Phase

logger = logging.getLogger(__name__)


def train(phase: Phase, save: Callable[[], None], save_interval: int, stop: StopRequest) -> Losses:
    """Run a phase to its end; returns the held-out losses there.

    save: writes a checkpoint of the phase as it is. Raises Interrupted after saving when asked to stop, TrainingError
    when too many steps in a row were not finite.
    """
    counters, steps = phase.counters, phase.batch.steps
    started = time.monotonic() - counters.seconds
    saved = counters.step
    if phase.losses is None:
        evaluate_and_reweight(phase, update=phase.name == "pretrain")
    while counters.step < steps:
        if stop_requested(stop, phase.layout):
            if counters.step > saved:
                save()
            raise Interrupted(
                f"stopped by a signal after step {counters.step} of {phase.name}, nothing is lost; "
                "run the same command to go on"
            )
        result = train_step(phase)
        phase.tick()
        log_attention_backend(phase)
        counters.step += 1
        counters.seconds = time.monotonic() - started
        count_live(counters, result)
        report_step(phase, result)
        phase.on_step(phase)
        stop_if_student_is_better(phase, result)
        check_divergence(phase, result)
        log_frozen_masks(phase)
        finished = counters.step == steps
        if finished or counters.step % phase.batch.eval_interval == 0:
            evaluate_and_reweight(phase, update=not finished)
            counters.seconds = time.monotonic() - started
        if finished or counters.step % save_interval == 0:
            save()
            saved = counters.step
    assert phase.losses is not None
    return phase.losses


def log_attention_backend(phase: Phase) -> None:
    """Print what serves attention on this GPU, once for each shape that was measured."""
    for line in ops.attention_choices()[len(phase.told) :]:
        phase.told.append(line)
        if phase.layout.is_main:
            print(f"attention on {line}", flush=True)


def stop_requested(stop: StopRequest, layout: Layout) -> bool:
    """Whether any rank was asked to stop; the same on every rank (all of them take part)."""
    flag = torch.tensor([int(stop.received is not None)], dtype=torch.int32, device=layout.device)
    return bool(max_over_world(flag).item())


def train_step(phase: Phase) -> StepResult:
    """Draw the next global batch and run one optimizer step on this rank's part of it."""
    counters, batch = phase.counters, phase.batch
    before = phase.stream.run_out()
    plan, samples = phase.batches.next()
    for name in sorted(set(phase.stream.run_out()) - set(before)):
        epochs = phase.stream.epochs()[name]
        logger.warning(
            "%s: step %d takes the last of domain %r after %.0f epochs; the others share its weight from here on",
            *(phase.name, counters.step + 1, name, epochs),
        )
    factor = learning_rate_factor(counters.step, batch.steps, phase.optimizer, phase.warmup_share)
    separator = phase.batches.loader.separator
    batches = micro_batches(samples, phase.layout, batch.micro_batch, phase.layout.device, separator)
    result = phase.stepper.run(batches, counters.step, factor, factor * phase.learning_rate)
    counters.skipped += result.skipped
    counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if result.skipped else 0
    if counters.skipped_in_a_row >= phase.logging.nonfinite_limit:
        raise TrainingError(
            f"{phase.name}: loss or gradient not finite in {counters.skipped_in_a_row} steps in a row, the last is "
            f"step {counters.step}, whose samples are {_sample_names(phase, plan)}; no weight was changed by them. "
            "Look at these samples, lower the learning rate, or raise logging.nonfinite_limit"
        )
    return result


def _sample_names(phase: Phase, plan: BatchPlan) -> str:
    names = [f"{phase.stream.names[d]}:{s}" for d, s in zip(plan.domain_B, plan.sample_B, strict=True)]
    return ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")


def evaluate_and_reweight(phase: Phase, update: bool) -> None:
    """Take the held-out losses; with `update`, the next domain weights from them. Writes the record and the masks."""
    started = time.monotonic()
    masks = phase.stepper.masks
    deterministic = None if masks is None else masks.deterministic("expected")
    chunks = phase.stepper.weights.chunks
    sequences = evaluate_sequences(phase.heldout, phase.layout, chunks, phase.batch.micro_batch, deterministic)
    phase.losses = losses = summarise(sequences)
    phase.counters.evaluation_seconds += time.monotonic() - started
    if update:
        for warning in phase.mixture.update({name: loss for name, (loss, _) in losses.items()}, phase.counters.step):
            logger.warning("%s: %s", phase.name, warning)
        phase.stream.set_weights(phase.mixture.weights)
    names = phase.stream.names
    phase.metrics.write(
        {
            "phase": phase.name,
            "step": phase.counters.step,
            "kind": "eval",
            "loss": {name: loss for name, (loss, _) in losses.items()},
            "error": {name: error for name, (_, error) in losses.items()},
            "reference": phase.mixture.references,
            "weights": dict(zip(names, map(float, phase.stream.weights), strict=True)),
        }
    )
    phase.metrics.write_sequences(phase.name, sequences, phase.heldout.digests)
    if deterministic is not None:
        phase.metrics.write_masks(deterministic.arrays())


def log_frozen_masks(phase: Phase) -> None:
    """Say what was open about the masks when they settled, and keep it for the phase's record."""
    masks, counters = phase.stepper.masks, phase.counters
    if masks is None or counters.step != masks.closing.freeze_step or not masks.undecided:
        return
    counters.undecided = list(masks.undecided)
    if phase.layout.is_main:
        print(f"{phase.name}: masks settle at step {counters.step}: {'; '.join(masks.undecided)}", flush=True)


def count_live(counters: Counters, result: StepResult) -> None:
    """Count a step by what it computed; unknown once a step is (live units are off)."""
    if counters.live_steps is None or result.live_flops is None:
        counters.live_steps = None
    else:
        counters.live_steps += result.live_flops


def report_step(phase: Phase, result: StepResult) -> None:
    """Write the records and print the line, every `logging.interval` steps and at the end."""
    counters = phase.counters
    if counters.step % phase.logging.interval and counters.step != phase.batch.steps:
        return
    phase.progress.advance(counters.step, phase.tokens)
    factor = learning_rate_factor(counters.step - 1, phase.batch.steps, phase.optimizer, phase.warmup_share)
    rate = factor * phase.learning_rate
    head = {"phase": phase.name, "step": counters.step}
    phase.metrics.write(
        head
        | {
            "kind": "train",
            "loss": result.loss,
            **distillation_record(phase, result),
            "lr": rate,
            "grad_norm": result.grad_norm,
            "tokens": phase.tokens,
            "tokens_per_second": phase.progress.tokens_per_second,
            "step_seconds": result.seconds,
            "seconds": counters.seconds,
            "evaluation_seconds": counters.evaluation_seconds,
            "domain_tokens": {d: n - phase.taken.get(d, 0) for d, n in phase.stream.tokens().items()},
            "domain_epochs": phase.stream.epochs(),
            "skipped": counters.skipped,
        }
    )
    expected = target = None
    if result.sparsity is not None and phase.stepper.masks is not None:
        expected = {name: float(value) for name, value in result.sparsity["expected"].items()}
        target = result.sparsity["target"]
        warn_ahead(phase, expected, target)
        pairs = {name: value.detach().cpu().numpy() for name, value in phase.stepper.masks.multipliers.items()}
        phase.metrics.write(
            head
            | {
                "kind": "mask",
                "expected": expected,
                "target": target,
                "lambda1": {name: float(pair[0]) for name, pair in pairs.items()},
                "lambda2": {name: float(pair[1]) for name, pair in pairs.items()},
                "lagrangian": result.lagrangian,
                "live_flops": result.live_flops,
                "live_steps": counters.live_steps,
            }
        )
    if phase.layout.is_main:
        taught = result.distillation, phase.teacher_flops
        print(phase.progress.line(result.loss, result.grad_norm, rate, expected, target, *taught), flush=True)


def distillation_record(phase: Phase, result: StepResult) -> dict[str, float]:
    """What a step's record says of the teacher; nothing in a phase that began without one."""
    if phase.teacher_flops is None:
        return {}
    taught = phase.counters.step if phase.counters.taught is None else phase.counters.taught
    numbers = {"distillation": result.distillation, "teacher_loss": result.teacher_loss}
    told = {key: value for key, value in numbers.items() if value is not None}
    return told | {"teacher_flops": phase.teacher_flops, "taught": taught}
