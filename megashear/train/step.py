"""One optimizer step: micro-batches through the pipeline, gradients of weights and masks, clipping, update or skip.

The loss is the mean over the tokens of the global batch, plus the Lagrangian, added once. If the loss or a gradient is
not finite on any rank, no rank updates anything. With a teacher the loss is mixed, and its parts are reported.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.engine.collectives import sum_over_world
from megashear.engine.layout import Layout
from megashear.engine.optimizer import WeightOptimizer, unwrap
from megashear.engine.pipeline import run_micro_batches
from megashear.masks.mask_optimizer import MaskOptimizer
from megashear.model.live_units import LivePattern, flops_share, live_patterns
from megashear.model.micro_batch import MicroBatch
from megashear.train.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Attributes:
        loss: Cross entropy, nats per token.
        distillation: T^2 KL from the teacher, nats per token; None without a teacher.
        teacher_loss: The teacher's cross entropy on the same text; None without a teacher.
        grad_norm: Gradient norm before clipping.
        skipped: Whether nothing was updated, because a number was not finite.
        lagrangian, sparsity: Value of the Lagrangian, and expected and target sparsity; None without masks.
        live_flops: Share of the model's FLOPs that was computed, mean over this rank's micro-batches.
        seconds: Wall time.
    """

    loss: float
    distillation: float | None
    teacher_loss: float | None
    grad_norm: float
    skipped: bool
    lagrangian: float | None
    sparsity: dict[str, dict[str, Any]] | None
    live_flops: float | None
    seconds: float


class Stepper:
    """Runs optimizer steps on this rank's chunks. `masks` is None except while pruning; `teacher` is optional."""

    def __init__(
        self,
        layout: Layout,
        weights: WeightOptimizer,
        mask_optimizer: MaskOptimizer | None,
        seed: int,
        micro_batch: int,
        clip_norm: float,
        clip_jointly: bool,
        teacher: Teacher | None = None,
    ) -> None:
        self.layout, self.weights, self.teacher = layout, weights, teacher
        self.mask_optimizer = mask_optimizer
        self.masks = None if mask_optimizer is None else mask_optimizer.masks
        self.seed, self.micro_batch = seed, micro_batch
        self.clip_norm, self.clip_jointly = clip_norm, clip_jointly
        self._live_flops: float | None = None

    def forward_backward(self, batches: list[MicroBatch], step: int) -> Tensor:
        """Accumulate and reduce the gradients of one global batch.

        Returns:
            Mean losses on every rank, fp64: cross entropy [1], with a teacher also T^2 KL and the teacher's cross
            entropy [3].
        """
        patterns = self._live_patterns([batch.index for batch in batches], step)
        length = batches[0].tokens_BS.shape[1]
        self._live_flops = self._share(list(patterns.values()), length)
        teacher_states = {} if self.teacher is None else self.teacher.states(batches, self.micro_batch)

        def forward(batch: MicroBatch, chunk: torch.nn.Module) -> Any:
            masks = None if self.masks is None else self.masks.sample(self.seed, step, batch.index)
            targets = None
            if self.teacher is not None and unwrap(chunk).post_process:
                targets = self.teacher.teacher_targets(teacher_states.pop(batch.index))
            output = chunk(batch.tokens_BS, batch.labels_BS, masks, patterns.get(batch.index), batch.first_BS, targets)
            return output, _mean_loss if targets is None else _mean_losses

        self.weights.zero_gradients()
        if self.mask_optimizer is not None:
            self.mask_optimizer.zero_gradients()
        losses = run_micro_batches(forward, self.weights.chunks, batches, length, self.micro_batch)
        if self.mask_optimizer is not None:
            sum_over_world(self.mask_optimizer.gradients_flat()).div_(self.layout.data_size)
        return self._mean_over_world(losses, len(batches), 1 if self.teacher is None else 3)

    @torch.no_grad()
    def _live_patterns(self, indices: list[int], step: int) -> dict[int, LivePattern]:
        """Zeros of the masks of this rank's micro-batches, by index: drawn ahead, so that one transfer serves all."""
        if self.masks is None or not self.masks.config.live_units:
            return {}
        drawn = live_patterns([self.masks.sample(self.seed, step, index) for index in indices])
        return dict(zip(indices, drawn, strict=True))

    def _share(self, patterns: list[LivePattern], length: int) -> float | None:
        """Mean share of the model's FLOPs that the patterns leave; None where everything is computed."""
        if self.masks is None or not patterns:
            return None
        return sum(flops_share(one, self.masks.source, length) for one in patterns) / len(patterns)

    def _mean_over_world(self, losses: list[Tensor], count: int, kinds: int) -> Tensor:
        total = torch.zeros(kinds, dtype=torch.float64, device=self.layout.device)
        if losses and self.layout.tensor_rank == 0:
            total += torch.stack(losses).double().view(-1, kinds).sum(0) / (count * self.layout.data_size)
        return sum_over_world(total)

    def run(self, batches: list[MicroBatch], step: int, factor: float, learning_rate: float) -> StepResult:
        """Run one step.

        Synchronises with the device once, for up to six numbers that decide whether and how far to step.

        Args:
            batches: Micro-batches of this rank.
            step: Step, from 0.
            factor: Factor of the learning-rate schedule, for masks and multipliers.
            learning_rate: Learning rate of the weights.
        """
        started = time.monotonic()
        losses = self.forward_backward(batches, step)
        numbers = [*losses, self.weights.prepare()]
        sparsity = None
        if self.mask_optimizer is not None:
            value, sparsity = self.mask_optimizer.add_constraint_gradients(step)
            numbers += [self.mask_optimizer.grad_norm_squared().double(), value.double()]
        values = torch.stack(numbers).tolist()
        (loss, *distilled), (square, *rest) = values[: len(losses)], values[len(losses) :]
        mask_square, lagrangian = rest or (0.0, None)
        total = math.sqrt(square + mask_square)
        clipped = total if self.clip_jointly else math.sqrt(square)
        skipped = not all(map(math.isfinite, (loss, *distilled, total)))
        if not skipped:
            self._update(clipped, factor, learning_rate, step)
        elif self.mask_optimizer is not None:
            self.mask_optimizer.skip(step)
        seconds = time.monotonic() - started
        live = self._live_flops
        divergence, teacher_loss = distilled if distilled else (None, None)
        return StepResult(loss, divergence, teacher_loss, clipped, skipped, lagrangian, sparsity, live, seconds)

    def _update(self, norm: float, factor: float, learning_rate: float, step: int) -> None:
        """Clip by the norm, and update weights, masks and multipliers."""
        scale = self.weights.scale(norm, self.clip_norm)
        if self.mask_optimizer is not None and self.clip_jointly:
            self.mask_optimizer.scale_gradients(scale)
        self.weights.step(learning_rate)
        if self.mask_optimizer is not None:
            self.mask_optimizer.step(factor, step)


def _mean_loss(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses_BS.mean()
    # The schedule divides its own copy in place; what is logged must not see that.
    return loss, loss.detach().clone()


def _mean_losses(losses_4BS: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed loss, and its parts to report: cross entropy, divergence, and the teacher's cross entropy."""
    mixed, *parts = losses_4BS.mean((1, 2)).unbind()
    return mixed.clone(), torch.stack(parts).detach()
