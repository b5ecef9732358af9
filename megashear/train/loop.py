"""The training loop of a stage: evaluate and re-weight domains, draw a batch, step, log, save, stop when asked.

Key properties: the order is fixed (step, records, evaluation, checkpoint, stop), and a checkpoint is taken after the
evaluation of its step, so that a run resumed from any checkpoint has the bits and the records of the unbroken one. The
loop knows no files: it is given a `save`. Read next: `stage.py`, `step.py`, `evaluate.py`.
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
from megashear.train.divergence_watch import warn_ahead, watch_step
from megashear.train.learning_rate import learning_rate_factor
from megashear.train.step import StepResult
from megashear.train.teacher import dismiss_teacher
from megashear.train.training_phase import Counters, Stage

logger = logging.getLogger(__name__)


def train(stage: Stage, save: Callable[[], None], save_interval: int, stop: StopRequest) -> Losses:
    """Run a stage to its end; returns the held-out losses there.

    save: writes a checkpoint of the stage as it is. Raises Interrupted after saving when asked to stop, TrainingError
    when too many steps in a row were not finite.
    """
    counters, steps = stage.counters, stage.batch.steps
    started = time.monotonic() - counters.seconds
    saved = counters.step
    if stage.losses is None:
        evaluate_and_reweight(stage, update=stage.name == "pretrain")
    while counters.step < steps:
        if stop_requested(stop, stage.layout):
            if counters.step > saved:
                save()
            raise Interrupted(
                f"stopped by a signal after step {counters.step} of {stage.name}, nothing is lost; "
                "run the same command to go on"
            )
        result = train_step(stage)
        stage.tick()
        tell_choices(stage)
        counters.step += 1
        counters.seconds = time.monotonic() - started
        count_live(counters, result)
        report_step(stage, result)
        stage.on_step(stage)
        dismiss_teacher(stage, result)
        watch_step(stage, result)
        tell_settled(stage)
        finished = counters.step == steps
        if finished or counters.step % stage.batch.eval_interval == 0:
            evaluate_and_reweight(stage, update=not finished)
            counters.seconds = time.monotonic() - started
        if finished or counters.step % save_interval == 0:
            save()
            saved = counters.step
    assert stage.losses is not None
    return stage.losses


def tell_choices(stage: Stage) -> None:
    """Print what serves attention on this GPU, once for each shape that was measured."""
    for line in ops.attention_choices()[len(stage.told) :]:
        stage.told.append(line)
        if stage.layout.is_main:
            print(f"attention on {line}", flush=True)


def stop_requested(stop: StopRequest, layout: Layout) -> bool:
    """Whether any rank was asked to stop; the same on every rank (all of them take part)."""
    flag = torch.tensor([int(stop.received is not None)], dtype=torch.int32, device=layout.device)
    return bool(max_over_world(flag).item())


def train_step(stage: Stage) -> StepResult:
    """Draw the next global batch and run one optimizer step on this rank's part of it."""
    counters, batch = stage.counters, stage.batch
    before = stage.stream.run_out()
    plan, samples = stage.batches.next()
    for name in sorted(set(stage.stream.run_out()) - set(before)):
        epochs = stage.stream.epochs()[name]
        logger.warning(
            "%s: step %d takes the last of domain %r after %.0f epochs; the others share its weight from here on",
            *(stage.name, counters.step + 1, name, epochs),
        )
    factor = learning_rate_factor(counters.step, batch.steps, stage.optimizer, stage.warmup_share)
    separator = stage.batches.loader.separator
    batches = micro_batches(samples, stage.layout, batch.micro_batch, stage.layout.device, separator)
    result = stage.stepper.run(batches, counters.step, factor, factor * stage.learning_rate)
    counters.skipped += result.skipped
    counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if result.skipped else 0
    if counters.skipped_in_a_row >= stage.logging.nonfinite_limit:
        raise TrainingError(
            f"{stage.name}: loss or gradient not finite in {counters.skipped_in_a_row} steps in a row, the last is "
            f"step {counters.step}, whose samples are {_sample_names(stage, plan)}; no weight was changed by them. "
            "Look at these samples, lower the learning rate, or raise logging.nonfinite_limit"
        )
    return result


def _sample_names(stage: Stage, plan: BatchPlan) -> str:
    names = [f"{stage.stream.names[d]}:{s}" for d, s in zip(plan.domain_B, plan.sample_B, strict=True)]
    return ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")


def evaluate_and_reweight(stage: Stage, update: bool) -> None:
    """Take the held-out losses; with `update`, the next domain weights from them. Writes the record and the masks."""
    started = time.monotonic()
    masks = stage.stepper.masks
    deterministic = None if masks is None else masks.deterministic("expected")
    chunks = stage.stepper.weights.chunks
    sequences = evaluate_sequences(stage.heldout, stage.layout, chunks, stage.batch.micro_batch, deterministic)
    stage.losses = losses = summarise(sequences)
    stage.counters.evaluation_seconds += time.monotonic() - started
    if update:
        for warning in stage.mixture.update({name: loss for name, (loss, _) in losses.items()}, stage.counters.step):
            logger.warning("%s: %s", stage.name, warning)
        stage.stream.set_weights(stage.mixture.weights)
    names = stage.stream.names
    stage.metrics.write(
        {
            "stage": stage.name,
            "step": stage.counters.step,
            "kind": "eval",
            "loss": {name: loss for name, (loss, _) in losses.items()},
            "error": {name: error for name, (_, error) in losses.items()},
            "reference": stage.mixture.references,
            "weights": dict(zip(names, map(float, stage.stream.weights), strict=True)),
        }
    )
    stage.metrics.write_sequences(stage.name, sequences, stage.heldout.digests)
    if deterministic is not None:
        stage.metrics.write_masks(deterministic.arrays())


def tell_settled(stage: Stage) -> None:
    """Say what was open about the masks when they settled, and keep it for the stage's record."""
    masks, counters = stage.stepper.masks, stage.counters
    if masks is None or counters.step != masks.closing.settle_step or not masks.undecided:
        return
    counters.undecided = list(masks.undecided)
    if stage.layout.is_main:
        print(f"{stage.name}: masks settle at step {counters.step}: {'; '.join(masks.undecided)}", flush=True)


def count_live(counters: Counters, result: StepResult) -> None:
    """Count a step by what it computed; unknown once a step is (live units are off)."""
    if counters.live_steps is None or result.live_flops is None:
        counters.live_steps = None
    else:
        counters.live_steps += result.live_flops


def report_step(stage: Stage, result: StepResult) -> None:
    """Write the records and print the line, every `logging.interval` steps and at the end."""
    counters = stage.counters
    if counters.step % stage.logging.interval and counters.step != stage.batch.steps:
        return
    stage.progress.advance(counters.step, stage.tokens)
    factor = learning_rate_factor(counters.step - 1, stage.batch.steps, stage.optimizer, stage.warmup_share)
    rate = factor * stage.learning_rate
    head = {"stage": stage.name, "step": counters.step}
    stage.metrics.write(
        head
        | {
            "kind": "train",
            "loss": result.loss,
            **taught_record(stage, result),
            "lr": rate,
            "grad_norm": result.grad_norm,
            "tokens": stage.tokens,
            "tokens_per_second": stage.progress.tokens_per_second,
            "step_seconds": result.seconds,
            "seconds": counters.seconds,
            "evaluation_seconds": counters.evaluation_seconds,
            "domain_tokens": {d: n - stage.taken.get(d, 0) for d, n in stage.stream.tokens().items()},
            "domain_epochs": stage.stream.epochs(),
            "skipped": counters.skipped,
        }
    )
    expected = target = None
    if result.sparsity is not None and stage.stepper.masks is not None:
        expected = {name: float(value) for name, value in result.sparsity["expected"].items()}
        target = result.sparsity["target"]
        warn_ahead(stage, expected, target)
        pairs = {name: value.detach().cpu().numpy() for name, value in stage.stepper.masks.multipliers.items()}
        stage.metrics.write(
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
    if stage.layout.is_main:
        taught = result.distillation, stage.teacher_flops
        print(stage.progress.line(result.loss, result.grad_norm, rate, expected, target, *taught), flush=True)


def taught_record(stage: Stage, result: StepResult) -> dict[str, float]:
    """What a step's record says of the teacher; nothing in a stage that began without one."""
    if stage.teacher_flops is None:
        return {}
    taught = stage.counters.step if stage.counters.taught is None else stage.counters.taught
    numbers = {"distillation": result.distillation, "teacher_loss": result.teacher_loss}
    told = {key: value for key, value in numbers.items() if value is not None}
    return told | {"teacher_flops": stage.teacher_flops, "taught": taught}
