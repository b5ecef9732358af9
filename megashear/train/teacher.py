"""The source model as a teacher: a frozen model on the student's layout and pipeline stages (Hinton et al. 2015).

Before the student's pass the teacher runs forward over all of the step's micro-batches, on the very token tensors that
the student takes: they travel to the device once. (The embedding's rows cannot be shared: the student's are trained,
and masked.) The last stage keeps its final states for every micro-batch, not its logits. A teacher has no gradients,
no optimizer and no state to save. Read next: `step.py`, `../model/distillation.py`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megashear.config.resolve import DistillationPlan
from megashear.engine.layout import Layout
from megashear.engine.parallel import gather_sequence
from megashear.engine.pipeline import run_micro_batches
from megashear.model.llama import Llama, TeacherTargets

if TYPE_CHECKING:
    from megashear.model.micro_batch import MicroBatch
    from megashear.train.step import StepResult
    from megashear.train.training_phase import Phase


WINDOW_STEPS = 8
"""Last steps in whose mean a student is no worse than its teacher when that goes."""


class Teacher:
    """A frozen model that gives the lessons of a step, one a micro-batch."""

    def __init__(self, chunks: list[Llama], how: DistillationPlan, layout: Layout) -> None:
        """chunks: this rank's, filled; of the student's vocabulary, any other size may differ."""
        self.chunks, self.how, self.layout = chunks, how, layout
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()

    @torch.no_grad()
    def states(self, batches: "list[MicroBatch]", micro_batch: int) -> dict[int, Tensor]:
        """Final states by the micro-batch's index, on the ranks of the last stage; elsewhere an empty dict.

        Every rank calls it. [S, B, D], of which a rank holds [S / TP, B, D] under sequence parallelism.
        """

        def forward(batch: "MicroBatch", chunk: Any) -> Any:
            states = chunk.states(batch.tokens_BS, first_BS=batch.first_BS)
            return states, lambda states: (states.new_zeros(()), states)

        length = batches[0].tokens_BS.shape[1]
        kept = run_micro_batches(forward, list(self.chunks), batches, length, micro_batch, forward_only=True)
        return {batch.index: states for batch, states in zip(batches, kept, strict=bool(kept))}

    def teacher_targets(self, states_SBD: Tensor) -> TeacherTargets:
        """The lesson of a micro-batch from its final states; on every tensor-parallel rank of the last stage."""
        if self.layout.sequence:
            states_SBD = gather_sequence(states_SBD)
        return TeacherTargets(states_SBD, self.chunks[-1].output_weight(), self.how)


def stop_if_student_is_better(phase: "Phase", result: "StepResult") -> None:
    """Go on without the teacher once the student is no worse than it (every rank), by their cross entropy on the very
    text of the last WINDOW steps: that costs nothing, waits for no evaluation, and is of equal text.

    A student whose masks are open is its teacher, so that pruning asks once each granularity has half of its target
    sparsity. A skipped step does not count; after the last one there is nothing left to ask.
    """
    teacher, masks, counters = phase.stepper.teacher, phase.stepper.masks, phase.counters
    if teacher is None or teacher.how.until == "end" or result.teacher_loss is None or result.skipped:
        return
    counters.behind = [*counters.behind, result.loss - result.teacher_loss][-WINDOW_STEPS:]
    mean = sum(counters.behind) / WINDOW_STEPS
    if len(counters.behind) < WINDOW_STEPS or mean > 0 or counters.step == phase.batch.steps:
        return
    expected = {} if result.sparsity is None else result.sparsity["expected"]
    if masks is not None and not masks.closing.at_half_target(counters.step - 1, expected):
        return
    counters.taught = counters.step
    phase.stop_distillation()
    if phase.layout.is_main:
        print(
            f"{phase.name}: step {counters.step}: over {WINDOW_STEPS} steps the model's loss is {-mean:.4f} below the "
            "source's on the same text: the teacher goes",
            flush=True,
        )
