"""What a training phase is made of, and how far it is. Read next: `loop.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from megashear.config.model_shape import ModelShape
from megashear.config.schema import LoggingConfig
from megashear.config.training_schema import BatchConfig, OptimizerConfig
from megashear.engine.layout import Layout
from megashear.engine.optimizer import unwrap
from megashear.evaluation.losses import Losses
from megashear.mixture.blend import BlendedStream
from megashear.mixture.domain_weights import Mixture
from megashear.mixture.loader import Batches, HeldOut
from megashear.train.learning_rate import PRETRAIN_WARMUP_SHARE, PRUNE_WARMUP_SHARE
from megashear.train.metrics import Metrics
from megashear.train.profiler import Tick
from megashear.train.progress import Progress
from megashear.train.step import Stepper


@dataclass
class Counters:
    """Plain numbers of a phase that are saved with it."""

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
    """Whether the phase has said that its masks destroy the model."""
    recheck_step: int = 0
    """Step before which a loss that is high for another reason (of the text, say) is not looked into again."""
    ahead: bool = False
    """Whether the phase has said that its masks close ahead of their schedule."""
    undecided: list[str] = field(default_factory=list)
    """What was open about the masks when they settled."""
    live_steps: float | None = 0.0
    """Steps of pruning, each counted as the share of the source's FLOPs that its live units needed; None: not known."""
    taught: int | None = None
    """Steps after which the teacher went; None while it is there, or where there was none."""
    behind: list[float] = field(default_factory=list)
    """The model's loss less the teacher's in the last steps, by which the teacher goes."""


def do_nothing(_: "Phase") -> None:
    """Default callback."""


@dataclass
class Phase:
    """A training phase: what it is made of, and how far it is."""

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
    on_step: "OnStep" = do_nothing
    """Called on every rank after a step's records are written, before its evaluation and checkpoint."""
    told: list[str] = field(default_factory=list)
    """Choices that were printed."""
    losses: Losses | None = None
    """Held-out losses of the last evaluation; None before the first one, which precedes the first step."""
    taken: dict[str, int] = field(default_factory=dict)
    """Tokens of each domain that earlier phases took of the stream."""
    source_loss: float | None = None
    """Mean held-out loss of the source model, by which pruning is watched; None: from scratch."""
    teacher_flops: float | None = None
    """A teacher's FLOPs as a share of those of training the whole model; None: the phase began without one."""

    def stop_distillation(self) -> None:
        """Drop the teacher: its memory is free, its FLOPs are no longer the phase's."""
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


OnStep: TypeAlias = Callable[[Phase], None]
"""Callback after each training step; see `megashear.phases.runner.run`."""
