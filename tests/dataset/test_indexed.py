import time
import tracemalloc

import numpy as np
import pytest

from megashear.dataset.indexed import CHUNK, IndexedTokens, IndexedWriter, token_dtype, write_index
from megashear.errors import DataError

VOCAB = {"uint16": 32000, "int32": 128256}


def documents(vocab: int, count: int = 40) -> list[np.ndarray]:
    random = np.random.default_rng(vocab)
    return [random.integers(0, vocab, random.integers(0, 60)) for _ in range(count)]


def write(prefix, docs, vocab):
    with IndexedWriter(prefix, token_dtype(vocab)) as writer:
        for ids in docs:
            writer.add_document(ids)
    return prefix


@pytest.mark.parametrize("name", VOCAB)
def test_megatron_core_opens_ours(tmp_path, name):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    docs = documents(VOCAB[name])
    prefix = write(tmp_path / "web.train", docs, VOCAB[name])
    theirs = indexed_dataset.IndexedDataset(str(prefix))
    assert len(theirs) == len(docs)
    assert theirs.document_indices.tolist() == list(range(len(docs) + 1))
    assert theirs.index.dtype == np.dtype(name)
    for ours, ids in enumerate(docs):
        assert theirs[ours].tolist() == ids.tolist()


@pytest.mark.parametrize("name", VOCAB)
def test_ours_opens_megatron_cores(tmp_path, name):
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    docs = [ids for ids in documents(VOCAB[name]) if len(ids)]
    prefix = tmp_path / "theirs"
    builder = indexed_dataset.IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=indexed_dataset.DType.optimal_dtype(VOCAB[name])
    )
    for ids in docs:
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    opened = IndexedTokens(prefix)
    assert opened.documents == len(docs)
    assert opened.tokens[:].tolist() == np.concatenate(docs).tolist()
    assert all(opened.document(n).tolist() == ids.tolist() for n, ids in enumerate(docs))


def test_megatron_cores_rule_for_the_dtype():
    optimal = pytest.importorskip("megatron.core.datasets.indexed_dataset").DType.optimal_dtype
    for vocab in (2, 65499, 65500, 65536, 128256):
        assert token_dtype(vocab) == np.dtype(optimal(vocab))


def test_no_documents(tmp_path):
    opened = IndexedTokens(write(tmp_path / "none", [], 100))
    assert opened.documents == 0 and opened.tokens.shape == (0,)


def test_documents_over_several_pieces_of_the_index(tmp_path):
    count = 2 * CHUNK + 3
    prefix = write(tmp_path / "many", [np.array([n % 7]) for n in range(count)], 100)
    opened = IndexedTokens(prefix)
    assert opened.documents == count
    assert np.array_equal(opened.offsets[:], 2 * np.arange(count))
    assert opened.tokens[-1] == (count - 1) % 7


def test_opening_does_not_read_the_documents(tmp_path):
    """A pair of 10^8 documents, holes on the disk, opens in milliseconds."""
    prefix = write(tmp_path / "big", [np.array([1])], 100)
    count = 10**8
    with open(tmp_path / "big.idx", "rb+") as file:
        file.seek(18)
        file.write(np.array([count, count + 1], "<u8").tobytes())
        file.truncate(34 + 12 * count + 8 * (count + 1))
        file.seek(34 + 4 * count - 4)
        file.write(np.array([1], "<i4").tobytes())
        file.seek(34 + 12 * count - 8)
        file.write(np.array([2 * (count - 1)], "<i8").tobytes())
    with open(tmp_path / "big.bin", "rb+") as file:
        file.truncate(2 * count)
    start = time.perf_counter()
    assert IndexedTokens(prefix).documents == count
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["cut", "grow", "empty", "missing"])
def test_a_damaged_file_is_refused_by_name(tmp_path, suffix, change):
    prefix = write(tmp_path / "web.train", documents(300), 300)
    path = tmp_path / f"web.train{suffix}"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-1], "grow": content + b"\0", "empty": b""}[change])
    with pytest.raises(DataError, match=r"web\.train"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("at, value", [(0, b"X"), (9, b"\2"), (17, b"\6"), (18, b"\xff"), (26, b"\xff")])
def test_a_damaged_header_is_refused(tmp_path, at, value):
    prefix = write(tmp_path / "p", documents(300), 300)
    content = bytearray((tmp_path / "p.idx").read_bytes())
    content[at : at + 1] = value
    (tmp_path / "p.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"p\.idx"):
        IndexedTokens(prefix)


def test_an_error_while_writing_leaves_no_index(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "p", token_dtype(10)) as writer:
        writer.add_document(np.array([1, 2]))
        raise RuntimeError
    assert not (tmp_path / "p.idx").exists()


def test_an_index_in_pieces_is_the_one_written_document_by_document(tmp_path):
    """Pieces of any size and integer dtype; the lengths are of documents, none of which need have any token."""
    lengths = np.random.default_rng(0).integers(0, 9, 2 * CHUNK + 3)
    prefix = write(tmp_path / "p", [np.ones(length, np.int64) for length in lengths], 100)
    pieces = np.split(lengths, [0, 1, 1, 70, CHUNK, CHUNK + 9])
    write_index(tmp_path / "pieces.idx", np.dtype(np.uint16), (piece.astype(np.int32) for piece in pieces))
    write_index(tmp_path / "whole.idx", np.dtype(np.uint16), [lengths])
    for name in ("pieces", "whole"):
        assert (tmp_path / f"{name}.idx").read_bytes() == (prefix.with_name("p.idx")).read_bytes()


def test_writing_an_index_holds_one_piece(tmp_path):
    """Five million documents, whose index has 100 MB: less than 8 MiB are held at the peak."""
    tracemalloc.start()
    write_index(tmp_path / "many.idx", np.dtype(np.uint16), (np.full(10_000, 3, np.int32) for _ in range(500)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "many.idx").stat().st_size == 34 + 20 * 5_000_000 + 8 and peak < 8 << 20
