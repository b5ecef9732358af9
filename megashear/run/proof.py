"""The proof of a cut: on held-out text the pruned model computes the logits of the masked one, under the run's layout.

Key properties: both run in fp32, where what the same function computed twice may differ by is known of an ordinary
model (`TOLERANCE`). One that was nearly destroyed may amplify rounding a thousandfold; so where that is exceeded the
masked model also runs in fp64, which tells what fp32 loses of this very model. Read next: `finalize.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megashear.data.loader import HeldOut
from megashear.engine.collectives import max_over_world
from megashear.engine.parallel import gather_logits
from megashear.engine.pipeline import run_micro_batches
from megashear.masks.masks import Masks
from megashear.run.context import Context
from megashear.run.evaluate import build_plain
from megashear.train.step import MicroBatch, local_rows, micro_batches
from megashear.weights.folder import ModelFolder

TOLERANCE = 1e-5
"""Largest difference of a logit, as a share of the largest logit: two fp32 computations of one function."""
ROUNDINGS = 4
"""How many times what fp32 loses of the masked model its logits and the pruned one's may differ by: either may be off
by as much to either side, and the pruned weights were rounded once more."""
SEQUENCES = 4
"""Held-out sequences per data-parallel rank on which the logits are compared."""


@dataclass(frozen=True)
class Proof:
    """How far two models are apart, as shares of the largest logit."""

    difference: float
    """Of the pruned model from the masked one, both in fp32."""
    rounding: float | None
    """Of the masked model in fp32 from itself in fp64; None where nothing asked for it."""

    @property
    def holds(self) -> bool:
        """Whether they are one function but for rounding; NaN is not."""
        return self.difference <= max(TOLERANCE, ROUNDINGS * (self.rounding or 0.0))


def prove(
    context: Context, masked: ModelFolder, masks: Masks, pruned: ModelFolder, heldout: HeldOut
) -> tuple[Proof, list[torch.nn.Module]]:
    """Compare the masked model with the pruned one; returns this rank's chunks of the pruned one in fp32 too.

    Every rank calls it, and gets the same proof. One model is in memory at a time, where nothing asks for fp64.
    """
    expected = _masked_logits(context, masked, masks, heldout, torch.float32)
    exact = context.config.prune.masking == "exact"
    chunks = build_plain(pruned, context.config.parallel, context.layout, exact)
    difference = _apart(context, expected, heldout_logits(context, chunks, heldout, None))
    if difference <= TOLERANCE:
        return Proof(difference, None), chunks
    wide = _masked_logits(context, masked, masks, heldout, torch.float64)
    return Proof(difference, _apart(context, wide, expected)), chunks


def _masked_logits(
    context: Context, masked: ModelFolder, masks: Masks, heldout: HeldOut, dtype: torch.dtype
) -> list[torch.Tensor]:
    exact = context.config.prune.masking == "exact"
    chunks = build_plain(masked, context.config.parallel, context.layout, exact, dtype)
    wide = Masks(*(None if mask is None else mask.to(dtype) for mask in vars(masks).values()))
    return heldout_logits(context, chunks, heldout, wide)


def heldout_logits(
    context: Context, chunks: list[torch.nn.Module], heldout: HeldOut, masks: Masks | None
) -> list[torch.Tensor]:
    """Logits [S, 1, V] of the first held-out sequences, one a micro-batch, on the ranks of the last stage."""
    layout = context.layout
    count = SEQUENCES * layout.data_size * layout.pipeline_size
    rows = [int(row) % len(heldout.rows) for row in local_rows(count, layout, 1)]
    samples, _ = heldout.read(rows)

    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> Any:
        return chunk(batch.tokens_BS, None, masks, None, batch.first_BS), lambda logits: (
            logits.sum(),
            gather_logits(logits),
        )

    batches = micro_batches(samples, layout, 1, layout.device, heldout.separator)
    with torch.no_grad():
        return run_micro_batches(forward, chunks, batches, samples.shape[1] - 1, 1, forward_only=True)


def _apart(context: Context, expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest difference of a logit over all ranks, as a share of the largest logit; padding columns are left out."""
    vocab = context.source_shape.vocab_size
    pair = torch.zeros(2, dtype=torch.float64, device=context.layout.device)
    for one, other in zip(expected, found, strict=True):
        one, other = one[..., :vocab].double(), other[..., :vocab].double()
        pair = torch.maximum(pair, torch.stack([(one - other).abs().max(), one.abs().max()]))
    difference, largest = max_over_world(pair).tolist()
    return difference / largest
