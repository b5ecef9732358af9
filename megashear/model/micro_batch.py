"""Micro-batches of a rank: rows of the global batch, tokens, labels and document starts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.engine.layout import Layout


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: tokens and next tokens [b, S], and its index within the global batch.

    first_BS: int32 [b, S], where the document of each token begins; None where attention crosses documents.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    index: int
    first_BS: Tensor | None = None


def micro_batches(
    samples: Tensor, layout: Layout, micro_batch: int, device: torch.device, separator: int | None = None
) -> list[MicroBatch]:
    """This rank's micro-batches from its samples [rows, S + 1]; rows are in the order of `local_rows`.

    samples: of any integer dtype; they travel as they are and are widened on the device. separator: the token that ends
    documents, where attention is to stay inside of them.
    """
    batches = []
    for number, part in enumerate(samples.to(device, non_blocking=True).long().split(micro_batch)):
        tokens_BS = part[:, :-1].contiguous()
        first_BS = None if separator is None else document_starts(tokens_BS, separator)
        index = number * layout.data_size + layout.data_rank
        batches.append(MicroBatch(tokens_BS, part[:, 1:].contiguous(), index, first_BS))
    return batches


def document_starts(tokens_BS: Tensor, separator: int) -> Tensor:
    """Position at which the document of each token begins, int32 [B, S]; a document ends with its separator."""
    position_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    begins_BS = torch.zeros_like(tokens_BS)
    begins_BS[:, 1:] = torch.where(tokens_BS[:, :-1] == separator, position_S[1:], 0)
    return begins_BS.cummax(1).values.int()


def local_rows(global_batch: int, layout: Layout, micro_batch: int) -> Tensor:
    """Rows of the global batch that this data-parallel rank trains on.

    Micro-batch j of the global batch is its rows j * b .. (j + 1) * b and belongs to rank j mod DP, so that the
    micro-batches, and with them the masks drawn for each, are the same in every layout.
    """
    rows = torch.arange(global_batch).view(-1, layout.data_size, micro_batch)
    return rows[:, layout.data_rank].reshape(-1)
