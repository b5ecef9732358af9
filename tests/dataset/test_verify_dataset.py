import os

import numpy as np
import pytest

from helpers.inputs import write_dataset
from megashear.dataset.dataset_folder import SPLITS
from megashear.dataset.verify_dataset import verify_dataset
from megashear.errors import DataError


def make(folder, model, documents: dict[tuple[str, str], list[list[int]]]):
    """A folder with a whole manifest, whatever its documents are."""
    domains = dict.fromkeys(domain for domain, _ in documents)
    parts = {name: [map(np.array, documents[name, split]) for split in SPLITS] for name in domains}
    write_dataset(folder, model, parts)
    return folder


def good(count: int, first: int) -> list[list[int]]:
    return [[first, 10 + n, 2] for n in range(count)]


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_a_good_dataset(tmp_path, sentencepiece_model, fraction):
    whole = {("web", "train"): good(400, 5), ("web", "heldout"): good(30, 6)}
    findings = verify_dataset(make(tmp_path / "d", sentencepiece_model, whole), fraction, workers=2)
    assert findings.problems == [] and len(findings.checked) == 5
    assert any("held-out" in line for line in findings.checked)


@pytest.mark.parametrize(
    "train, message",
    [
        ([*good(40, 5), [7, 8, 9], [5, 2]], "web.train.bin: document 40 does not end in the tokenizer's end token 2"),
        ([*good(40, 5), [7, 600, 2]], "a token outside of the tokenizer's 500 ids"),
        ([*good(40, 5), [6, 12, 2]], "web.train.bin: document 40 is held out as well"),
        ([*good(40, 5), [], [5, 2]], "document 40 does not end"),
    ],
)
def test_what_digests_cannot_tell(tmp_path, sentencepiece_model, train, message):
    whole = {("web", "train"): train, ("web", "heldout"): good(30, 6)}
    findings = verify_dataset(make(tmp_path / "d", sentencepiece_model, whole))
    assert len(findings.problems) == 1 and message in findings.problems[0]


def test_every_damaged_file_is_told(dataset_folder):
    """One flipped byte each, all told in one run."""
    damaged = ["web.train.bin", "code.heldout.idx", "tokenizer/tokenizer.model"]
    for name in damaged:
        content = bytearray((dataset_folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (dataset_folder / name).write_bytes(content)
    problems = verify_dataset(dataset_folder, workers=3).problems
    assert all(any(f"{name}: its SHA-256" in problem for problem in problems) for name in damaged)
    assert not any("code.train" in problem for problem in problems)


def test_missing_and_strange_files_are_told(dataset_folder):
    os.remove(dataset_folder / "web.heldout.crc")
    (dataset_folder / "notes.txt").write_text("mine")
    problems = verify_dataset(dataset_folder).problems
    assert any("web.heldout.crc: missing" in problem for problem in problems)
    assert any("notes.txt: not named in the manifest" in problem for problem in problems)


def test_a_sample_finds_damage_as_often_as_it_is_large(tmp_path, sentencepiece_model, monkeypatch):
    """Of 40 samples of a third, each looking at blocks and at documents, about a half find one flipped bit."""
    monkeypatch.setattr("megashear.dataset.dataset_folder.BLOCK", 64)
    monkeypatch.setattr("megashear.dataset.document_checks.CHUNK", 8)
    whole = {("web", "train"): good(400, 5), ("web", "heldout"): []}
    folder = make(tmp_path / "d", sentencepiece_model, whole)
    content = bytearray((folder / "web.train.bin").read_bytes())
    content[1000] ^= 1
    (folder / "web.train.bin").write_bytes(content)
    found = sum(bool(verify_dataset(folder, 1 / 3, seed).problems) for seed in range(40))
    assert 8 <= found <= 38
    assert verify_dataset(folder).problems


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: not found"):
        verify_dataset(tmp_path)
