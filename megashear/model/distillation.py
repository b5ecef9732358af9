"""What a teacher has to say about a micro-batch, on the ranks that take the student's loss.

Key property: of the teacher's forward pass its final states [S, B, D] are kept, in the dtype of its weights; its logits
are made of them for a chunk of tokens at a time, and exist for one chunk alone. Read next: `../ops/distillation.py`,
`../train/teacher.py`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megashear.config.teaching import Teaching


@dataclass(frozen=True)
class Lesson:
    """The teacher's normalised final states of every position [S, B, D], its output layer's rows on this rank
    [V / TP, D], and how it enters the loss.
    """

    states_SBD: Tensor
    output_VD: Tensor
    how: Teaching

    def logits(self, start: int, stop: int) -> Tensor:
        """Vocabulary-parallel logits [stop - start, V / TP] of tokens counted position by position (S outside B)."""
        return F.linear(self.states_SBD.flatten(0, 1)[start:stop], self.output_VD)
