"""Prove that the pruned model computes the logits of the masked one, on held-out text, under the run's layout.

Both run in fp32 with a tolerance for the rounding of an ordinary model. A nearly destroyed model can amplify rounding a
thousandfold; if the tolerance is exceeded, both run in fp64 and have to agree far better.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from megashear.config.model_shape import ModelShape
from megashear.engine.collectives import max_over_world, sum_over_world
from megashear.engine.parallel import gather_logits
from megashear.engine.pipeline import run_micro_batches
from megashear.evaluation.evaluate_model import plain_chunks
from megashear.hf.model_folder import ModelFolder
from megashear.masks.fold import LAYER_NAME, Folding
from megashear.masks.mask_values import Masks
from megashear.mixture.loader import HeldOut
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches
from megashear.model.weight_io import TensorSource
from megashear.phases.run_folder import Context

TOLERANCE = 1e-5
"""Largest difference of a logit, as a share of the largest logit: two fp32 computations of one function."""
EXACT_TOLERANCE = 1e-9
"""The same of two fp64 computations."""
LOOSE_TOLERANCE = 1e-2
"""What fp32 may be off by at most where fp64 proved the cut: the folder's tensors are that cut, rounded."""
SEQUENCES = 4
"""Held-out sequences per data-parallel rank on which the logits are compared."""


@dataclass(frozen=True)
class Proof:
    """Difference of two models, as shares of the largest logit."""

    difference: float
    """Of the pruned model from the masked one, both in fp32."""
    exact: float | None
    """Of the same cut from the masked model, both in fp64; None where nothing asked for it."""

    @property
    def holds(self) -> bool:
        """Whether both are the same function to rounding; False for NaN."""
        if self.exact is None:
            return self.difference <= TOLERANCE
        return self.exact <= EXACT_TOLERANCE and self.difference <= LOOSE_TOLERANCE


@dataclass(frozen=True)
class _Cut:
    """Tensors of the pruned model in fp64, folded from the masked model's when they are read."""

    masked: ModelFolder
    fold: Folding

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        match = LAYER_NAME.fullmatch(name)
        layer = None if match is None else int(self.fold.keep.layer[int(match[1])])
        source = name if match is None else f"model.layers.{layer}.{match[2]}.weight"
        made = self.fold(source, self.masked.read(source).double())
        assert made is not None, name
        return made[1].narrow(dim, start, stop - start)


def prove(
    context: Context, masked: ModelFolder, fold: Folding, pruned: ModelFolder, heldout: HeldOut
) -> tuple[Proof, list[torch.nn.Module]]:
    """Compare the masked model with the pruned one.

    Call it on every rank; all get the same proof. One model is in memory at a time, unless fp64 is needed.

    Returns:
        The proof, and this rank's chunks of the pruned model in fp32.
    """
    expected = _logits(context, masked.shape, masked, heldout, torch.float32, fold.masks)
    chunks = _chunks(context, pruned.shape, pruned, torch.float32)
    difference = _apart(context, expected, heldout_logits(context, chunks, heldout, None))
    if difference <= TOLERANCE:
        return Proof(difference, None), chunks
    expected = _logits(context, masked.shape, masked, heldout, torch.float64, fold.masks)
    found = _logits(context, pruned.shape, _Cut(masked, fold), heldout, torch.float64, None)
    return Proof(difference, _apart(context, expected, found)), chunks


def _chunks(context: Context, shape: ModelShape, source: TensorSource, dtype: torch.dtype) -> list[torch.nn.Module]:
    exact = context.config.prune.masking == "exact"
    return plain_chunks(shape, source, context.config.parallel, context.layout, exact, dtype)


def _logits(
    context: Context,
    shape: ModelShape,
    source: TensorSource,
    heldout: HeldOut,
    dtype: torch.dtype,
    masks: Masks | None,
) -> list[torch.Tensor]:
    wide = None if masks is None else masks.to(context.layout.device, dtype)
    return heldout_logits(context, _chunks(context, shape, source, dtype), heldout, wide)


def heldout_logits(
    context: Context, chunks: list[torch.nn.Module], heldout: HeldOut, masks: Masks | None
) -> list[torch.Tensor]:
    """Logits [S, 1, V] of the first held-out sequences, one per micro-batch, on ranks of the last pipeline stage."""
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
    """Largest difference of a logit over all ranks, as a share of the largest logit, without padding columns.

    NaN if a logit of either model is not finite. If all expected logits are 0: 0 if the others are too, else infinite.
    """
    vocab = context.source_shape.vocab_size
    pair = torch.zeros(2, dtype=torch.float64, device=context.layout.device)
    damaged = torch.zeros(1, dtype=torch.float64, device=context.layout.device)
    for one, other in zip(expected, found, strict=True):
        one, other = one[..., :vocab].double(), other[..., :vocab].double()
        damaged += (~(one.isfinite() & other.isfinite())).sum()
        one, other = one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
        pair = torch.maximum(pair, torch.stack([(one - other).abs().max(), one.abs().max()]))
    difference, largest = max_over_world(pair).tolist()
    if sum_over_world(damaged).item():
        return math.nan
    if largest == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    share: float = difference / largest
    return share
