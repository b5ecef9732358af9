import numpy as np
import pytest
import torch

from megashear.errors import DataError
from megashear.mixture.blend import BlendedStream, sources
from megashear.mixture.loader import HeldOut, Loader

LENGTH = 16


@pytest.fixture
def loader(dataset):
    return Loader(dataset, BlendedStream(sources(dataset, LENGTH), 3, [0.5, 0.3, 0.2]), LENGTH)


def test_rows_are_samples_of_their_domains(dataset, loader):
    plan = loader.stream.next_batch(20)
    tokens, domain = loader.read(plan, slice(None))
    assert tokens.shape == (20, LENGTH + 1) and (tokens.dtype, domain.dtype) == (torch.uint16, torch.int64)
    for row in range(20):
        stream = dataset.stream(dataset.domains[plan.domain_B[row]])
        start = plan.sample_B[row] * LENGTH
        assert tokens[row].tolist() == stream[start : start + LENGTH + 1].tolist()
        assert domain[row] == plan.domain_B[row]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_rows_make_the_global_batch(loader, ranks):
    plan = loader.stream.next_batch(20)
    whole, _ = loader.read(plan, slice(None))
    parts = [loader.read(plan, np.arange(rank, 20, ranks))[0] for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::ranks])


def test_tokens_can_be_changed_without_changing_the_file(dataset, loader):
    plan = loader.stream.next_batch(4)
    tokens, _ = loader.read(plan, [0])
    before = tokens.clone()
    tokens.zero_()
    assert torch.equal(loader.read(plan, [0])[0], before)


def test_held_out_windows(dataset):
    """As many as asked for, at equal distances; all where there are fewer."""
    held = HeldOut(dataset, LENGTH, 10)
    for index, name in enumerate(dataset.domains):
        there = len(dataset.stream(name, "heldout")) // (LENGTH + 1)
        windows = [window for domain, window in held.rows if domain == index]
        assert len(windows) == min(there, 10) == len(set(windows))
        assert windows[0] == 0 and windows[-1] + -(-there // len(windows)) >= there
        assert set(np.diff(windows)) <= {there // len(windows), -(-there // len(windows))}
    tokens, domain = held.read(range(len(held.rows)))
    assert tokens.shape == (25, LENGTH + 1) and domain.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    stream = dataset.stream("code", "heldout")
    assert tokens[20:].flatten().tolist() == stream[: 5 * (LENGTH + 1)].tolist()
    assert torch.equal(held.read([3, 21])[0], tokens[[3, 21]])
    assert torch.equal(held.read(slice(2, 4))[0], tokens[2:4])


def test_a_domain_without_one_held_out_window(dataset):
    with pytest.raises(DataError, match=r"'code' has 90 held-out tokens.*--heldout-fraction"):
        HeldOut(dataset, 90, 10)


def test_equal_windows_have_equal_digests(dataset):
    digests = HeldOut(dataset, LENGTH, 4).digests()
    assert list(digests) == dataset.domains and len(set(digests.values())) == 3
    assert HeldOut(dataset, LENGTH, 10).first(4).digests()["web"] != digests["web"]  # other windows: they are spread
    assert HeldOut(dataset, LENGTH, 4).digests() == digests
    assert HeldOut(dataset, LENGTH, 4, separate_documents=True).digests().keys() == digests.keys()
    assert set(HeldOut(dataset, LENGTH, 4, separate_documents=True).digests().values()).isdisjoint(digests.values())
