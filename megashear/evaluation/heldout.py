"""Held-out loss per domain with its standard error, over the same sequences each time.

Sequences are spread over data-parallel ranks. All have one length, so the mean over sequences is the token mean; the
error is the standard deviation over sequences divided by the square root of their number.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megashear.engine.collectives import sum_over_world
from megashear.engine.layout import Layout
from megashear.engine.pipeline import run_micro_batches
from megashear.evaluation.losses import Losses, SequenceLosses, summarise
from megashear.masks.mask_values import Masks
from megashear.mixture.loader import HeldOut
from megashear.model.live_units import live_patterns
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches


def evaluate_heldout(
    heldout: HeldOut, layout: Layout, chunks: list[torch.nn.Module], micro_batch: int, masks: Masks | None = None
) -> Losses:
    """Loss in nats per token and its standard error, by domain. A collective; the result is the same on every rank."""
    return summarise(evaluate_sequences(heldout, layout, chunks, micro_batch, masks))


def evaluate_sequences(
    heldout: HeldOut, layout: Layout, chunks: list[torch.nn.Module], micro_batch: int, masks: Masks | None = None
) -> SequenceLosses:
    """Losses of each sequence, by domain; see `evaluate_heldout`."""
    total = len(heldout.rows)
    wave = layout.data_size * micro_batch * (layout.pipeline_size if layout.virtual_size > 1 else 1)
    padded = -(-total // wave) * wave
    rows = local_rows(padded, layout, micro_batch)
    samples, _ = heldout.read([int(row) if row < total else 0 for row in rows])
    losses = (
        _sequence_losses(layout, chunks, samples, rows, padded, micro_batch, masks, heldout.separator)[:total]
        .cpu()
        .numpy()
    )
    domain_N = np.array([domain for domain, _ in heldout.rows])
    return {name: losses[domain_N == index] for index, name in enumerate(heldout.names)}


def _sequence_losses(
    layout: Layout,
    chunks: list[torch.nn.Module],
    samples: Tensor,
    rows: Tensor,
    total: int,
    micro_batch: int,
    masks: Masks | None,
    separator: int | None,
) -> Tensor:
    """Mean loss of every sequence, fp64 [total]; samples [n, S + 1] and their numbers `rows` [n] are this rank's."""

    pattern = None if masks is None else live_patterns([masks])[0]

    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> Any:
        losses_BS = chunk(batch.tokens_BS, batch.labels_BS, masks, pattern, batch.first_BS)
        return losses_BS, lambda losses_BS: (losses_BS.mean(), losses_BS.mean(1))

    batches = micro_batches(samples, layout, micro_batch, layout.device, separator)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        collected = run_micro_batches(forward, chunks, batches, samples.shape[1] - 1, micro_batch, forward_only=True)
    for chunk in chunks:
        chunk.train()
    losses = torch.zeros(total, dtype=torch.float64, device=layout.device)
    if collected and layout.tensor_rank == 0:
        losses[rows.to(losses.device)] = torch.cat(collected).double()
    return sum_over_world(losses)
