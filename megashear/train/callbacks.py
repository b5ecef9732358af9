"""Callbacks of the training loop: logs, evaluation, distillation, checkpoints, stopping."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from megashear import ops
from megashear.engine.collectives import max_over_world
from megashear.engine.layout import Layout
from megashear.errors import Interrupted
from megashear.evaluation.heldout import evaluate_sequences
from megashear.evaluation.losses import summarise
from megashear.processes import StopRequest
from megashear.train.step import StepResult
from megashear.train.training_phase import Callback, Phase

logger = logging.getLogger(__name__)

WINDOW_STEPS = 8
"""Steps over which student and teacher are compared."""


class AttentionBackendLog(Callback):
    """Print the attention backend selected on a GPU, once for each measured shape."""

    def __init__(self) -> None:
        self._printed = 0

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Print the choices made since the last step."""
        choices = ops.attention_choices()
        for line in choices[self._printed :]:
            if phase.layout.is_main:
                print(f"attention backend: {line}", flush=True)
        self._printed = len(choices)


class StepLog(Callback):
    """Write the step's records and print the progress line, every `logging.interval` steps and at the end."""

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Write and print."""
        counters = phase.counters
        if counters.step % phase.logging.interval and not phase.is_finished:
            return
        phase.progress.advance(counters.step, phase.tokens)
        rate = phase.learning_rate_factor(counters.step - 1) * phase.learning_rate
        phase.metrics.write(training_record(phase, result, rate))
        expected = target = None
        if result.sparsity is not None:
            expected = {name: float(value) for name, value in result.sparsity["expected"].items()}
            target = result.sparsity["target"]
            phase.metrics.write(mask_record(phase, result, expected))
        if phase.layout.is_main:
            teacher = result.distillation, phase.teacher_flops
            print(phase.progress.line(result.loss, result.grad_norm, rate, expected, target, *teacher), flush=True)


def training_record(phase: Phase, result: StepResult, rate: float) -> dict[str, Any]:
    """Record of kind `train`; `rate` is the learning rate of the weights in the step."""
    counters = phase.counters
    return {
        "phase": phase.name,
        "step": counters.step,
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
        "domain_tokens": {name: n - phase.earlier_tokens.get(name, 0) for name, n in phase.stream.tokens().items()},
        "domain_epochs": phase.stream.epochs(),
        "skipped": counters.skipped,
    }


def distillation_record(phase: Phase, result: StepResult) -> dict[str, float]:
    """Fields about the teacher; empty in a phase that started without one."""
    if phase.teacher_flops is None:
        return {}
    counters = phase.counters
    losses = {"distillation": result.distillation, "teacher_loss": result.teacher_loss}
    fields = {name: value for name, value in losses.items() if value is not None}
    distilled = counters.step if counters.distilled_steps is None else counters.distilled_steps
    return fields | {"teacher_flops": phase.teacher_flops, "distilled_steps": distilled}


def mask_record(phase: Phase, result: StepResult, expected: dict[str, float]) -> dict[str, Any]:
    """Record of kind `mask`; `expected` is the expected sparsity by granularity."""
    optimizer = phase.stepper.mask_optimizer
    assert optimizer is not None and result.sparsity is not None
    pairs = {name: value.detach().cpu().numpy() for name, value in optimizer.constraint.multipliers.items()}
    return {
        "phase": phase.name,
        "step": phase.counters.step,
        "kind": "mask",
        "expected": expected,
        "target": result.sparsity["target"],
        "lambda1": {name: float(pair[0]) for name, pair in pairs.items()},
        "lambda2": {name: float(pair[1]) for name, pair in pairs.items()},
        "lagrangian": result.lagrangian,
        "live_flops": result.live_flops,
        "live_steps": phase.counters.live_steps,
    }


class DistillationStop(Callback):
    """Stop distillation once the student is no worse than its teacher.

    Both are compared by their cross entropy on the text of the last WINDOW_STEPS steps, which costs nothing. While its
    masks are open the student is its teacher, so pruning compares from half of the target sparsities on. Skipped steps
    do not count.
    """

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Compare, and stop distillation if the student is no worse."""
        teacher, masks, counters = phase.stepper.teacher, phase.stepper.mask_optimizer, phase.counters
        if teacher is None or teacher.how.stop_when == "end" or result.teacher_loss is None or result.skipped:
            return
        counters.loss_gaps = [*counters.loss_gaps, result.loss - result.teacher_loss][-WINDOW_STEPS:]
        gap = sum(counters.loss_gaps) / WINDOW_STEPS
        if len(counters.loss_gaps) < WINDOW_STEPS or gap > 0 or phase.is_finished:
            return
        expected = {} if result.sparsity is None else result.sparsity["expected"]
        if masks is not None and not masks.schedule.at_half_target(counters.step - 1, expected):
            return
        phase.stop_distillation()
        if phase.layout.is_main:
            print(
                f"{phase.name}: step {counters.step}: student overtook the teacher (loss {-gap:.4f} lower over "
                f"{WINDOW_STEPS} steps); distillation stopped",
                flush=True,
            )


class FrozenMasksLog(Callback):
    """Report what was undecided about the masks when they were frozen, and keep it for the phase's record."""

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Report at the step at which masks are frozen."""
        masks, counters = phase.stepper.mask_optimizer, phase.counters
        if masks is None or counters.step != masks.schedule.freeze_step or not masks.undecided:
            return
        counters.undecided = list(masks.undecided)
        if phase.layout.is_main:
            print(f"{phase.name}: masks frozen at step {counters.step}: {'; '.join(masks.undecided)}", flush=True)


class HeldOutEvaluation(Callback):
    """Evaluate held-out losses and update the domain weights (dynamic batch loading).

    Pre-training also updates the weights before its first step. No update follows the last step.
    """

    def on_start(self, phase: Phase) -> None:
        """Evaluate before the first step, unless a checkpoint has the losses."""
        if phase.losses is None:
            self.evaluate(phase, update=phase.name == "pretrain")

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Evaluate every `batch.eval_interval` steps and at the end."""
        if phase.is_finished or phase.counters.step % phase.batch.eval_interval == 0:
            self.evaluate(phase, update=not phase.is_finished)
            phase.update_clock()

    def evaluate(self, phase: Phase, update: bool) -> None:
        """Evaluate, update the weights if asked to, and write records and masks."""
        started = time.monotonic()
        masks = phase.stepper.masks
        deterministic = None if masks is None else masks.deterministic("expected")
        chunks = phase.stepper.weights.chunks
        sequences = evaluate_sequences(phase.heldout, phase.layout, chunks, phase.batch.micro_batch, deterministic)
        phase.losses = losses = summarise(sequences)
        phase.counters.evaluation_seconds += time.monotonic() - started
        means = {name: loss for name, (loss, _) in losses.items()}
        if update:
            for warning in phase.mixture.update(means, phase.counters.step):
                logger.warning("%s: %s", phase.name, warning)
            phase.stream.set_weights(phase.mixture.weights)
        phase.metrics.write(
            {
                "phase": phase.name,
                "step": phase.counters.step,
                "kind": "eval",
                "loss": means,
                "error": {name: error for name, (_, error) in losses.items()},
                "reference": phase.mixture.references,
                "weights": dict(zip(phase.stream.names, map(float, phase.stream.weights), strict=True)),
            }
        )
        phase.metrics.write_sequences(phase.name, sequences, phase.heldout.digests)
        if deterministic is not None:
            phase.metrics.write_masks(deterministic.arrays())


class Checkpoints(Callback):
    """Save a checkpoint every `interval` steps and at the end.

    Args:
        save: Writes a checkpoint of the phase in its present state.
        interval: Steps between checkpoints.
    """

    def __init__(self, save: Callable[[Phase], None], interval: int) -> None:
        self._save, self._interval = save, interval
        self._saved_step = 0

    def on_start(self, phase: Phase) -> None:
        """Note the step of the checkpoint from which the phase was resumed."""
        self._saved_step = phase.counters.step

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Save if the step is due."""
        if phase.is_finished or phase.counters.step % self._interval == 0:
            self.save(phase)

    def save(self, phase: Phase) -> None:
        """Save now, unless this step is saved."""
        if phase.counters.step > self._saved_step:
            self._save(phase)
            self._saved_step = phase.counters.step


class StopOnSignal(Callback):
    """Save a checkpoint and raise Interrupted before the next step, once any rank was asked to stop."""

    def __init__(self, stop: StopRequest, checkpoints: Checkpoints) -> None:
        self._stop, self._checkpoints = stop, checkpoints

    def before_step(self, phase: Phase) -> None:
        """Ask all ranks."""
        if stop_requested(self._stop, phase.layout):
            self._checkpoints.save(phase)
            raise Interrupted(
                f"interrupted by a signal after step {phase.counters.step} of {phase.name}; checkpoint saved. "
                "Rerun the same command to resume"
            )


def stop_requested(stop: StopRequest, layout: Layout) -> bool:
    """Whether any rank was asked to stop. A collective: call it on every rank, and all get the same answer."""
    flag = torch.tensor([int(stop.received is not None)], dtype=torch.int32, device=layout.device)
    return bool(max_over_world(flag).item())
