"""Which rows of a global batch a rank trains on; the step itself is proved in `parallel/test_step.py`."""

import pytest
import torch

from megashear.engine.layout import Layout
from megashear.model.micro_batch import document_starts, local_rows, micro_batches


def layout(data_size: int, data_rank: int) -> Layout:
    device = torch.device("cpu")
    return Layout(1, 0, 1, 0, 1, data_size, data_rank, False, data_size, data_rank, device)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 6])
def test_micro_batches_are_the_same_on_every_layout(data_size: int, micro_batch: int) -> None:
    """Each micro-batch of the global batch is trained on by one rank, under its own number."""
    samples = torch.randint(0, 100, (48, 9), generator=torch.Generator().manual_seed(1))
    found = {}
    for rank in range(data_size):
        here = layout(data_size, rank)
        rows = local_rows(48, here, micro_batch)
        for one in micro_batches(samples[rows], here, micro_batch, here.device):
            assert one.index not in found
            found[one.index] = one
    assert sorted(found) == list(range(48 // micro_batch))
    for index, one in found.items():
        part = samples[index * micro_batch : (index + 1) * micro_batch]
        assert torch.equal(one.tokens_BS, part[:, :-1]) and torch.equal(one.labels_BS, part[:, 1:])


def test_documents_start_after_their_separator() -> None:
    tokens = torch.tensor([[5, 6, 2, 7, 2, 2, 8], [2, 5, 6, 7, 8, 9, 2]])
    assert document_starts(tokens, 2).tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    one = micro_batches(tokens.to(torch.uint16), layout(1, 0), 2, torch.device("cpu"), 2)[0]
    assert one.tokens_BS.dtype == torch.int64 and one.first_BS is not None
    assert one.first_BS.tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]]
