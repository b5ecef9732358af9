"""Micro-batches of a rank: rows of the global batch, tokens, labels and document starts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.engine.layout import Layout


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank.

    Attributes:
        tokens_BS, labels_BS: Tokens and next tokens, int64 [b, S].
        index: Index within the global batch.
        first_BS: Start position of each token's document, int32 [b, S]; None if attention crosses documents.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    index: int
    first_BS: Tensor | None = None


def micro_batches(
    samples: Tensor, layout: Layout, micro_batch: int, device: torch.device, separator: int | None = None
) -> list[MicroBatch]:
    """Split this rank's samples [rows, S + 1] into micro-batches; rows are in the order of `local_rows`.

    Args:
        samples: Any integer dtype; widened on the device.
        layout: Layout of the ranks.
        micro_batch: Sequences per micro-batch.
        device: Device of the rank.
        separator: Token that ends documents, if attention is restricted to them.
    """
    batches = []
    for number, part in enumerate(samples.to(device, non_blocking=True).long().split(micro_batch)):
        tokens_BS = part[:, :-1].contiguous()
        first_BS = None if separator is None else document_starts(tokens_BS, separator)
        index = number * layout.data_size + layout.data_rank
        batches.append(MicroBatch(tokens_BS, part[:, 1:].contiguous(), index, first_BS))
    return batches


def document_starts(tokens_BS: Tensor, separator: int) -> Tensor:
    """Start position of each token's document, int32 [B, S]; a document ends with its separator."""
    position_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    begins_BS = torch.zeros_like(tokens_BS)
    begins_BS[:, 1:] = torch.where(tokens_BS[:, :-1] == separator, position_S[1:], 0)
    return begins_BS.cummax(1).values.int()


def local_rows(global_batch: int, layout: Layout, micro_batch: int) -> Tensor:
    """Rows of the global batch that this data-parallel rank trains on.

    Micro-batch j of the global batch is rows j * b .. (j + 1) * b and belongs to rank j mod DP, so micro-batches and
    their masks are the same in every layout.
    """
    rows = torch.arange(global_batch).view(-1, layout.data_size, micro_batch)
    return rows[:, layout.data_rank].reshape(-1)
