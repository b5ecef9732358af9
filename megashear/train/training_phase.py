"""State of a training phase (`prune` or `pretrain`), and the base class of callbacks.

A phase is everything that the training loop works on. Its state is in the model, the optimizers, the stream of samples,
the mixture and `Counters`; a checkpoint saves exactly these.
"""

import time
from dataclasses import dataclass, field

from megashear.config.model_shape import ModelShape
from megashear.config.schema import LoggingConfig
from megashear.config.training_schema import BatchConfig, OptimizerConfig
from megashear.engine.layout import Layout
from megashear.engine.optimizer import unwrap
from megashear.evaluation.losses import Losses
from megashear.mixture.blend import BlendedStream
from megashear.mixture.domain_weights import Mixture
from megashear.mixture.loader import Batches, HeldOut
from megashear.train.learning_rate import PRETRAIN_WARMUP_SHARE, PRUNE_WARMUP_SHARE, learning_rate_factor
from megashear.train.metrics import Metrics
from megashear.train.progress import Progress
from megashear.train.step import Stepper, StepResult


@dataclass
class Counters:
    """Numbers of a phase that its checkpoints save.

    Attributes:
        step: Optimizer steps done.
        seconds: Wall time of the training loop.
        evaluation_seconds: Part of `seconds` spent on held-out evaluations.
        calibration_seconds: Wall time of basis and scores before the first step, without evaluations; not in `seconds`.
        skipped: Steps skipped because a loss or gradient was not finite.
        skipped_in_a_row: The same since the last step that was not skipped.
        smoothed_loss: Exponential average of the training loss while pruning.
        warned_divergence: Whether the divergence warning was issued.
        recheck_step: Step before which a high loss that has another cause is not checked again.
        warned_ahead: Whether a warning about masks ahead of their schedule was issued.
        undecided: What was undecided about the masks when they were frozen.
        live_steps: Steps of pruning, each as shares of the source's FLOPs that were computed; None if unknown.
        distilled_steps: Steps after which distillation stopped; None while it is on, or without a teacher.
        loss_gaps: Student's loss minus teacher's in the last steps.
    """

    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    calibration_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    smoothed_loss: float | None = None
    warned_divergence: bool = False
    recheck_step: int = 0
    warned_ahead: bool = False
    undecided: list[str] = field(default_factory=list)
    live_steps: float | None = 0.0
    distilled_steps: int | None = None
    loss_gaps: list[float] = field(default_factory=list)


@dataclass(kw_only=True)
class Phase:
    """A training phase on this rank.

    Attributes:
        name: `prune` or `pretrain`.
        learning_rate: Peak learning rate of the weights.
        losses: Held-out losses of the last evaluation; None before the first one, which precedes the first step.
        earlier_tokens: Tokens of each domain that earlier phases took from the stream.
        source_loss: Mean held-out loss of the source, with which pruning is compared; None from scratch.
        teacher_flops: FLOPs of the teacher as a share of training the whole model; None without a teacher.
    """

    name: str
    batch: BatchConfig
    optimizer: OptimizerConfig
    learning_rate: float
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
    losses: Losses | None = None
    earlier_tokens: dict[str, int] = field(default_factory=dict)
    source_loss: float | None = None
    teacher_flops: float | None = None
    _started: float = 0.0

    @property
    def shape(self) -> ModelShape:
        """Shape of the whole model that is trained."""
        shape: ModelShape = unwrap(self.stepper.weights.chunks[0]).shape
        return shape

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.counters.step * self.batch.global_batch * self.batches.loader.sequence_length

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.counters.step == self.batch.steps

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the peak learning rate at a step, counted from 0."""
        warmup_share = PRUNE_WARMUP_SHARE if self.name == "prune" else PRETRAIN_WARMUP_SHARE
        return learning_rate_factor(step, self.batch.steps, self.optimizer, warmup_share)

    def start_clock(self) -> None:
        """Start to measure wall time, from where a checkpoint left it."""
        self._started = time.monotonic() - self.counters.seconds

    def update_clock(self) -> None:
        """Update the counter of wall time."""
        self.counters.seconds = time.monotonic() - self._started

    def count_step(self, result: StepResult) -> None:
        """Count a step, its time, and the share of the model that it computed."""
        counters = self.counters
        counters.step += 1
        self.update_clock()
        if counters.live_steps is None or result.live_flops is None:
            counters.live_steps = None
        else:
            counters.live_steps += result.live_flops

    def stop_distillation(self) -> None:
        """Free the teacher; later steps train on the cross entropy only."""
        self.counters.distilled_steps = self.counters.step
        self.stepper.teacher = None
        self.progress.flops_per_token = self.shape.flops_per_token(self.batches.loader.sequence_length)


class Callback:
    """Hook into the training loop. Every method is called on every rank, in the order of the list of callbacks."""

    def on_start(self, phase: Phase) -> None:
        """Called once, before the first step of this process."""

    def before_step(self, phase: Phase) -> None:
        """Called before each step."""

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Called after each step, once it is counted."""
