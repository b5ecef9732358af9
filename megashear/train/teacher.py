"""The source as teacher: a frozen model on the student's layout and pipeline stages (Hinton et al. 2015).

Before the student's pass the teacher runs forward over all micro-batches of the step, on the same token tensors. The
last pipeline stage keeps its final states for every micro-batch, not its logits. A teacher has no gradients, no
optimizer and no state to save.
"""

from typing import Any

import torch
from torch import Tensor

from megashear.config.resolve import DistillationPlan
from megashear.engine.layout import Layout
from megashear.engine.parallel import gather_sequence
from megashear.engine.pipeline import run_micro_batches
from megashear.model.llama import Llama, TeacherTargets
from megashear.model.micro_batch import MicroBatch


class Teacher:
    """A frozen model that gives the targets of a step, one per micro-batch."""

    def __init__(self, chunks: list[Llama], how: DistillationPlan, layout: Layout) -> None:
        """chunks: this rank's, filled; of the student's vocabulary, any other size may differ."""
        self.chunks, self.how, self.layout = chunks, how, layout
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()

    @torch.no_grad()
    def states(self, batches: list[MicroBatch], micro_batch: int) -> dict[int, Tensor]:
        """Final states by the micro-batch's index, on the ranks of the last stage; elsewhere an empty dict.

        Every rank calls it. [S, B, D], of which a rank holds [S / TP, B, D] under sequence parallelism.
        """

        def forward(batch: MicroBatch, chunk: Any) -> Any:
            states = chunk.states(batch.tokens_BS, first_BS=batch.first_BS)
            return states, lambda states: (states.new_zeros(()), states)

        length = batches[0].tokens_BS.shape[1]
        kept = run_micro_batches(forward, list(self.chunks), batches, length, micro_batch, forward_only=True)
        return {batch.index: states for batch, states in zip(batches, kept, strict=bool(kept))}

    def teacher_targets(self, states_SBD: Tensor) -> TeacherTargets:
        """Targets of a micro-batch from its final states; call it on every tensor-parallel rank of the last stage."""
        if self.layout.sequence:
            states_SBD = gather_sequence(states_SBD)
        return TeacherTargets(states_SBD, self.chunks[-1].output_weight(), self.how)
