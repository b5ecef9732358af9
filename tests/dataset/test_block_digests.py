import gc
import os
import random
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.dataset import block_digests as blocks
from megashear.dataset.block_digests import CheckedArray, CheckedFile, digest_file
from megashear.dataset.dataset_folder import SPLITS, Dataset
from megashear.errors import DataError


@pytest.fixture
def array(tmp_path):
    """1 000 numbers behind a header of 34 bytes, in blocks of 64 bytes."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(34) + np.arange(1000, dtype="<i4").tobytes())
    digests = digest_file(path, 64)
    return CheckedArray(CheckedFile(path, digests.size, digests.crc_B, 64), np.dtype("<i4"), 34, 1000)


def damage(path, at: int) -> None:
    with open(path, "rb+") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


INDEX = st.integers(-1000, 999) | st.builds(
    slice, *[st.none() | st.integers(-1200, 1200)] * 2, st.none() | st.sampled_from([1, 2, 7, -1, -3])
)


@given(INDEX)
def test_whatever_is_taken_is_what_numpy_takes(tmp_path_factory, key):
    array = make(tmp_path_factory)
    assert np.array_equal(array[key], np.arange(1000)[key])


@given(INDEX, st.integers(0, 999))
def test_a_damaged_number_is_never_returned(tmp_path_factory, key, number):
    array = make(tmp_path_factory)
    damage(array.file.path, 34 + 4 * number)
    try:
        taken = np.atleast_1d(array[key])
    except DataError as error:
        assert "numbers: bytes" in str(error)
    else:
        assert number not in np.atleast_1d(np.arange(1000)[key])
        assert np.array_equal(taken, np.atleast_1d(np.arange(1000)[key]))


def make(tmp_path_factory) -> CheckedArray:
    path = tmp_path_factory.mktemp("array") / "numbers"
    path.write_bytes(bytes(34) + np.arange(1000, dtype="<i4").tobytes())
    digests = digest_file(path, 64)
    return CheckedArray(CheckedFile(path, digests.size, digests.crc_B, 64), np.dtype("<i4"), 34, 1000)


def test_a_block_is_compared_once_and_only_where_it_is_touched(array, monkeypatch):
    compared = []
    crc32 = blocks.zlib.crc32
    monkeypatch.setattr(blocks.zlib, "crc32", lambda data: compared.append(len(data)) or crc32(data))
    array[0:7], array[3], array[0:7]
    assert compared == [64]
    array[0:8]
    assert compared == [64, 64]
    array[-1]
    assert compared == [64, 64, 64, 2]  # the last number lies in two blocks
    np.asarray(array)
    assert len(compared) == -(-(34 + 4000) // 64)


def test_a_view_outlives_its_reader(array):
    view, path = array[10:20], array.file.path
    del array
    gc.collect()
    path.unlink()
    assert view.tolist() == list(range(10, 20))


def test_a_file_cut_after_opening_is_an_error_not_the_end_of_the_process(array):
    os.truncate(array.file.path, 100)
    with pytest.raises(DataError, match="its size has changed"):
        array[500]


def test_digests_do_not_depend_on_how_a_file_is_read(tmp_path):
    import hashlib
    import zlib

    content = random.Random(0).randbytes(1000)
    (tmp_path / "f").write_bytes(content)
    digests = digest_file(tmp_path / "f", 300)
    assert digests.sha256 == hashlib.sha256(content).hexdigest() and digests.size == 1000
    assert digests.crc_B.tolist() == [zlib.crc32(content[at : at + 300]) for at in range(0, 1000, 300)]


# ---- R1: no damage of a dataset's files is silent ----


def mutate(folder, files, dice: random.Random) -> list:
    """Flip a bit, cut, grow, blank, or swap two files; returns the files that changed."""
    path, kind = dice.choice(files), dice.randrange(5)
    if kind == 4:
        other = dice.choice([f for f in files if f.suffix == path.suffix and f != path] or [path])
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second), other.write_bytes(first)
        return [path, other] if first != second else []
    content = bytearray(path.read_bytes())
    before, at = bytes(content), dice.randrange(len(content))
    if kind == 0:
        content[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content += dice.randbytes(dice.randrange(1, 99))
    else:
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    path.write_bytes(content)
    return [path] if bytes(content) != before else []


def read_all(dataset: Dataset) -> dict:
    """All that training and inspection read: streams, and documents through their index."""
    taken = {}
    for domain in dataset.domains:
        for split in SPLITS:
            pair = dataset.pair(domain, split)
            taken[domain, split] = [np.array(pair.tokens)]
            taken[domain, split] += [pair.document(n).copy() for n in range(0, pair.documents, 3)]
    return taken


def equal(ours: dict, true: dict) -> bool:
    return all(len(ours[k]) == len(true[k]) and all(map(np.array_equal, ours[k], true[k])) for k in true)


def test_a_thousand_mutations_give_no_wrong_token(tmp_path, sentencepiece_model, write_dataset, monkeypatch):
    """A pair has 10 blocks or so; every change of `.bin`, `.idx` or `.crc` is an error that names a file."""
    monkeypatch.setattr("megashear.dataset.dataset_folder.BLOCK", 256)
    sizes = {"web": (1200, 300), "code": (1200, 300), "книги": (500, 100)}
    folder = write_dataset(tmp_path / "dataset", sentencepiece_model, sizes)
    shutil.copytree(folder, tmp_path / "whole")
    true, dice = read_all(Dataset.open(folder)), random.Random(1)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for _ in range(1000):
        changed = mutate(folder, files, dice)
        try:
            taken = read_all(dataset := Dataset.open(folder))
            assert equal(taken, true)
            dataset.tokenizer()
        except DataError as error:
            assert str(folder) in str(error)
        else:
            assert {path.name for path in changed} <= {"manifest.json"}, changed  # a number that nobody needs
        for path in changed:
            shutil.copyfile(tmp_path / "whole" / path.relative_to(folder), path)
