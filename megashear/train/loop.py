"""The training loop of a stage: evaluate and re-weight domains, draw a batch, step, log, save, stop when asked.

Key properties: the order is fixed (step, records, evaluation, checkpoint, stop), and a checkpoint is taken after the
evaluation of its step, so that a run resumed from any checkpoint has the bits and the records of the unbroken one. The
loop knows no files: it is given a `save`. Read next: `step.py`, `evaluate.py`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megashear import ops
from megashear.config.schema import LoggingConfig
from megashear.config.shape import ModelShape
from megashear.config.training_schema import BatchConfig, OptimizerConfig
from megashear.data.batches import Batches
from megashear.data.blend import BatchPlan, BlendedStream
from megashear.data.loader import HeldOut
from megashear.data.mixture import Mixture
from megashear.engine.collectives import max_over_world
from megashear.engine.layout import Layout
from megashear.engine.optimizer import unwrap
from megashear.errors import Interrupted, TrainingError
from megashear.masks.masks import Masks
from megashear.train import watch
from megashear.train.evaluate import evaluate, evaluate_sequences
from megashear.train.losses import Losses, mean_loss
from megashear.train.metrics import Metrics
from megashear.train.profile import Tick
from megashear.train.progress import Progress
from megashear.train.schedule import PRETRAIN_WARMUP_SHARE, PRUNE_WARMUP_SHARE, learning_rate_factor
from megashear.train.sequences import summarise
from megashear.train.signals import StopRequest
from megashear.train.step import Stepper, StepResult, micro_batches

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Plain numbers of a stage that are saved with it."""

    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    """Of `seconds`, those that held-out evaluations took."""
    calibration_seconds: float = 0.0
    """What basis and scores took before the first step, without evaluations of the source; not in `seconds`."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    smoothed_loss: float | None = None
    warned: bool = False
    """Whether the stage has said that its masks destroy the model."""
    look_again: int = 0
    """Step before which a loss that is high for another reason (of the text, say) is not looked into again."""
    ahead: bool = False
    """Whether the stage has said that its masks close ahead of their schedule."""
    undecided: list[str] = field(default_factory=list)
    """What was open about the masks when they settled."""
    live_steps: float | None = 0.0
    """Steps of pruning, each counted as the share of the source's FLOPs that its live units needed; None: not known."""
    taught: int | None = None
    """Steps after which the teacher went; None while it is there, or where there was none."""


@dataclass
class Stage:
    """A training stage: what it is made of, and how far it is."""

    name: str
    batch: BatchConfig
    optimizer: OptimizerConfig
    learning_rate: float
    """Peak of the weights' learning rate."""
    logging: LoggingConfig
    layout: Layout
    stepper: Stepper
    stream: BlendedStream
    batches: Batches
    heldout: HeldOut
    mixture: Mixture
    metrics: Metrics
    progress: Progress
    counters: Counters = field(default_factory=Counters)
    tick: Tick = lambda: None
    """Called after every step; a profiler counts by it."""
    told: list[str] = field(default_factory=list)
    """Choices that were printed."""
    losses: Losses | None = None
    """Held-out losses of the last evaluation; None before the first one, which precedes the first step."""
    taken: dict[str, int] = field(default_factory=dict)
    """Tokens of each domain that earlier stages took of the stream."""
    source_loss: float | None = None
    """Mean held-out loss of the source model, by which pruning is watched and a teacher goes; None: from scratch."""

    teacher_flops: float | None = None
    """A teacher's FLOPs as a share of those of training the whole model; None: the stage began without one."""

    def go_untaught(self) -> None:
        """Drop the teacher: its memory is free, its FLOPs are no longer the stage's."""
        self.stepper.teacher = None
        self.progress.flops_per_token = self.shape.flops_per_token(self.batches.loader.sequence_length)

    @property
    def shape(self) -> ModelShape:
        """Of the whole model that is trained."""
        shape: ModelShape = unwrap(self.stepper.weights.chunks[0]).shape
        return shape

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.counters.step * self.batch.global_batch * self.batches.loader.sequence_length

    @property
    def warmup_share(self) -> float:
        """Share of the steps that the learning rate warms up, where the config leaves it open."""
        return PRUNE_WARMUP_SHARE if self.name == "prune" else PRETRAIN_WARMUP_SHARE


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
    dismiss_teacher(stage, mean_loss(losses))


def dismiss_teacher(stage: Stage, loss: float) -> None:
    """Go on without the teacher once the model's mean held-out loss is not above the source's (every rank).

    Both losses are of the same windows; one that is not finite decides nothing. While masks are closing the model still
    has what they are going to take, so that pruning asks once they have their target sparsities. After the last step
    there is nothing left to ask.
    """
    stepper, step = stage.stepper, stage.counters.step
    if stepper.teacher is None or stepper.teacher.how.until == "end" or stage.source_loss is None:
        return
    if step == stage.batch.steps:
        return
    if not loss <= stage.source_loss or (stepper.masks is not None and not stepper.masks.closing.closed(step)):
        return
    stage.counters.taught = step
    stage.go_untaught()
    if stage.layout.is_main:
        print(
            f"{stage.name}: after step {step} the model's held-out loss of {loss:.4f} is not above the source's "
            f"{stage.source_loss:.4f}: the teacher goes",
            flush=True,
        )


def watch_step(stage: Stage, result: StepResult) -> None:
    """Warn once where a pruning stage's loss says that its masks destroy the model, and which of them (every rank)."""
    counters, masks = stage.counters, stage.stepper.masks
    if masks is None or stage.source_loss is None:
        return
    counters.smoothed_loss = average = watch.smoothed(counters.smoothed_loss, result.loss)
    if average is None or counters.warned or not average > watch.limit(stage.source_loss, masks.source.vocab_size):
        return
    if counters.step < counters.look_again:
        return
    few, batch = stage.heldout.first(watch.SEQUENCES), stage.batch.micro_batch

    def loss(mask: Masks | None) -> float:
        return mean_loss(evaluate(few, stage.layout, stage.stepper.weights.chunks, batch, mask))

    seed, step = stage.stepper.seed, counters.step
    with torch.no_grad():
        together = masks.sample(seed, step, 0)
    means = {"open": loss(None)}
    if not watch.confirmed(stage.source_loss, means["open"], loss(together)):
        counters.look_again = 2 * step
        return
    counters.warned = True
    means |= {name: loss(mask) for name, mask in masks.alone(seed, step, 0).items()}
    logger.warning("%s: %s", stage.name, watch.verdict(counters.step, average, stage.source_loss, means, masks.config))


def warn_ahead(stage: Stage, expected: dict[str, float], target: dict[str, float]) -> None:
    """Warn once where masks close far ahead of their schedule."""
    if stage.counters.ahead:
        return
    text = watch.ahead(stage.counters.step, expected, target)
    if text is not None:
        stage.counters.ahead = True
        logger.warning("%s: %s", stage.name, text)


def tell_settled(stage: Stage) -> None:
    """Say what was open about the masks when they settled, and keep it for the stage's record."""
    masks, counters = stage.stepper.masks, stage.counters
    if masks is None or counters.step != masks.closing.settle_step or not masks.undecided:
        return
    counters.undecided = list(masks.undecided)
    if stage.layout.is_main:
        print(f"{stage.name}: masks settle at step {counters.step}: {'; '.join(masks.undecided)}", flush=True)


def count_live(counters: Counters, result: StepResult) -> None:
    """Count a step by what it computed; unknown once a step is (live units are off, or an older version began)."""
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
    told = {} if result.distillation is None else {"distillation": result.distillation}
    return told | {"teacher_flops": stage.teacher_flops, "taught": taught}
