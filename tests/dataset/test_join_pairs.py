"""megatron-core's own builder is the oracle: its merge of the same pairs has the same bytes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megashear.dataset.indexed import IndexedTokens, IndexedWriter, write_index
from megashear.dataset.join_pairs import merge_pairs, split_pair
from megashear.errors import DataError

indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
torch = pytest.importorskip("torch")


def build(prefix, seed: int, documents: int, dtype=np.uint16):
    """Documents of none to three sequences of up to 9 tokens, by Megatron's builder."""
    random = np.random.default_rng(seed)
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for _ in range(documents):
        lengths = random.integers(1, 9, random.integers(0, 4)).tolist()
        builder.add_document(torch.from_numpy(random.integers(0, 500, sum(lengths))), lengths)
    builder.finalize(f"{prefix}.idx")
    return prefix


def files(prefix) -> tuple[bytes, bytes]:
    return prefix.with_name(prefix.name + ".bin").read_bytes(), prefix.with_name(prefix.name + ".idx").read_bytes()


@pytest.fixture(params=[3, 1 << 16])
def chunk(request, monkeypatch):
    """Chunks smaller and larger than the pairs."""
    monkeypatch.setattr("megashear.dataset.join_pairs.CHUNK", request.param)
    monkeypatch.setattr("megashear.dataset.join_pairs.TOKENS", 1 + request.param // 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_merged_as_megatron_core_merges(tmp_path, chunk, dtype):
    prefixes = [build(tmp_path / f"p{n}", n, count, dtype) for n, count in enumerate((20, 1, 33))]
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merged = merge_pairs(tmp_path / "ours", prefixes)
    assert merged.documents == 54
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_cut_apart_and_put_together_it_is_the_same(tmp_path, chunk):
    prefix = build(tmp_path / "p", 0, 40)
    targets = [tmp_path / f"t{n}" for n in range(4)]
    parts = split_pair(prefix, targets, [13, 13, 14, 40])
    assert [part.documents for part in parts] == [13, 0, 1, 26]
    whole = IndexedTokens(prefix)
    for part, first in zip(parts, (0, 13, 13, 14), strict=True):
        for number in range(part.documents):
            assert part.document(number).tolist() == whole.document(first + number).tolist()
        if part.documents:  # Megatron maps no empty file
            theirs = indexed_dataset.IndexedDataset(str(part.bin_path).removesuffix(".bin"))
            assert len(theirs.document_indices) == part.documents + 1
    merge_pairs(tmp_path / "again", targets)
    assert files(tmp_path / "again") == files(prefix)


def test_pairs_that_do_not_go_together(tmp_path):
    first, second = build(tmp_path / "a", 0, 5), build(tmp_path / "b", 1, 5, np.int32)
    with pytest.raises(DataError, match=r"b\.bin: int32 ids, the first pair has uint16"):
        merge_pairs(tmp_path / "t", [first, second])
    with pytest.raises(DataError, match="cannot be cut at"):
        split_pair(first, [tmp_path / "t"], [4])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[34] += 1
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.idx: sequences do not lie back to back"):
        merge_pairs(tmp_path / "t", [first])
    assert not list(tmp_path.glob("t.*"))


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """Two million documents, whose index has 40 MB: less than 20 MiB are held at the peak."""
    import tracemalloc

    with IndexedWriter(tmp_path / "p", np.dtype(np.uint16)) as writer:
        one = np.array([1], np.uint16)
        for _ in range(200_000):
            writer.add_document(one)
    tracemalloc.start()
    merged = merge_pairs(tmp_path / "t", [tmp_path / "p"] * 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert merged.documents == 2_000_000 and peak < 20 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is Linux's")
def test_mapped_files_are_given_back(tmp_path):
    """A pair of 160 MB, 3 million documents, in a process of its own: less than 48 MiB are resident beside the rest."""
    write_index(tmp_path / "p.idx", np.dtype(np.uint16), (np.full(10_000, 16, np.int32) for _ in range(300)))
    with open(tmp_path / "p.bin", "wb") as file:
        file.truncate(2 * 16 * 3_000_000)
    gained = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert int(gained) < 48 << 10, f"{gained} KiB"


MEASURE = """
import sys
from pathlib import Path
from megashear.dataset.join_pairs import merge_pairs

def resident(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])

folder, before = Path(sys.argv[1]), resident("VmRSS")
assert merge_pairs(folder / "t", [folder / "p"]).documents == 3_000_000
print(resident("VmHWM") - before)
"""
