import gzip
import json
from pathlib import Path

import pytest
import zstandard

from megashear.dataset.dataset_folder import Dataset
from megashear.errors import BusyError, DataError, StorageError
from megashear.files.lock import run_lock
from megashear.preprocess.build_dataset import Preprocessing, preprocess, table
from megashear.preprocess.domains import DomainRule
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging
from megashear.preprocess.tokenized_parts import PartSettings

COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}
HELDOUT = HeldOutRule(0.02, 10, 32)


def write_shards(folder: Path, texts: list[str], bad_lines: list[bytes] = ()) -> Path:
    """Three domains, a shard of each form for each; bad lines at the end of the first."""
    folder.mkdir()
    names = [(domain, suffix) for domain in ("web", "книги", "code") for suffix in COMPRESS]
    for number, (domain, suffix) in enumerate(names):
        lines = [json.dumps({"text": text}).encode() for text in texts[number::9][:60]]
        content = b"\n".join(lines + (list(bad_lines) if number == 0 else [])) + b"\n"
        (folder / f"{domain}_{number:05d}{suffix}").write_bytes(COMPRESS[suffix](content))
    return folder


def job(shards: Path, tokenizer: Path, output: Path, **changed) -> Preprocessing:
    return Preprocessing(
        **{"inputs": [str(shards)], "tokenizer": tokenizer, "output": output, "merging": Merging(HELDOUT), **changed}
    )


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, texts):
    return write_shards(tmp_path_factory.mktemp("inputs") / "shards", texts)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, shards, sentencepiece_model):
    output = tmp_path_factory.mktemp("unbroken") / "dataset"
    summary = preprocess(job(shards, sentencepiece_model, output))
    return output, summary


def test_an_unbroken_run(unbroken, shards, texts):
    output, summary = unbroken
    dataset = Dataset.open(output)
    dataset.verify()
    assert dataset.domains == ["code", "web", "книги"]
    assert (summary.shards, summary.lines, summary.bad, summary.kept) == (9, 540, 0, 0)
    assert sum(split["documents"] for splits in summary.counts.values() for split in splits.values()) == 540
    assert not output.with_name("dataset.parts").exists()
    assert "книги" in table(summary, HELDOUT) and "540 lines, 0 bad" in table(summary, HELDOUT)


def test_the_number_of_workers_changes_no_byte(tmp_path, shards, sentencepiece_model, unbroken):
    preprocess(job(shards, sentencepiece_model, tmp_path / "dataset", workers=3))
    assert content_of(tmp_path / "dataset") == content_of(unbroken[0])


def test_finished_shards_are_taken_over(tmp_path, shards, sentencepiece_model, unbroken, monkeypatch):
    """The disk fails while merging; the second run tokenises nothing and ends in the same bytes."""
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise OSError(28, "No space left on device")

        patch.setattr("megashear.preprocess.build_dataset.merge_parts", refuse)
        with pytest.raises(StorageError, match="the disk is full"):
            preprocess(job(shards, sentencepiece_model, tmp_path / "dataset"))
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.parts"]
    summary = preprocess(job(shards, sentencepiece_model, tmp_path / "dataset"))
    assert summary.kept == 9
    assert content_of(tmp_path / "dataset") == content_of(unbroken[0])


def test_bad_lines_are_kept_aside_up_to_the_limit(tmp_path, texts, sentencepiece_model, unbroken):
    shards = write_shards(tmp_path / "shards", texts, [b"{broken", b"", b'{"text": "caf\xe9"}'])
    with pytest.raises(DataError, match=r"3 of 543 lines are bad.*dataset\.parts/bad_lines\.jsonl"):
        preprocess(job(shards, sentencepiece_model, tmp_path / "dataset"))
    assert not (tmp_path / "dataset").exists()
    summary = preprocess(job(shards, sentencepiece_model, tmp_path / "dataset", max_bad_fraction=0.01))
    assert (summary.bad, summary.lines, summary.kept) == (3, 543, 9)
    told = [json.loads(line) for line in (tmp_path / "dataset" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"].split(" (")[0]) for entry in told] == [
        (61, "not JSON"),
        (62, "empty line"),
        (63, "not UTF-8"),
    ]
    assert all(entry["file"].endswith("web_00000.jsonl") for entry in told)
    ours, whole = content_of(tmp_path / "dataset"), content_of(unbroken[0])
    assert all(ours[name] == whole[name] for name in whole if name.endswith((".bin", ".idx")))


def test_shards_in_pieces_give_the_same_bytes(tmp_path, texts, sentencepiece_model, monkeypatch):
    """Also the numbers of the bad lines, which stand at the end of the first shard."""
    shards = write_shards(tmp_path / "shards", texts, [b"{broken", b"", b'{"text": "caf\xe9"}'])
    preprocess(job(shards, sentencepiece_model, tmp_path / "whole", max_bad_fraction=0.01))
    monkeypatch.setattr("megashear.preprocess.shard_files.LARGEST_PIECE", 5000)
    summary = preprocess(job(shards, sentencepiece_model, tmp_path / "pieces", max_bad_fraction=0.01, workers=2))
    assert (summary.shards, summary.lines, summary.bad) == (9, 543, 3)
    assert content_of(tmp_path / "pieces") == content_of(tmp_path / "whole")


def test_a_truncated_shard_stops_the_run_by_name(tmp_path, texts, sentencepiece_model):
    shards = write_shards(tmp_path / "shards", texts)
    path = next(shards.glob("*_00005.jsonl.zst"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"_00005\.jsonl\.zst: truncated"):
        preprocess(job(shards, sentencepiece_model, tmp_path / "dataset", workers=2))
    assert not (tmp_path / "dataset").exists()


def test_one_domain_for_all_and_a_tokenizer_json(tmp_path, shards, tokenizer_json):
    part = PartSettings(rule=DomainRule(fixed="all"))
    preprocess(job(shards, tokenizer_json, tmp_path / "dataset", part=part))
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.domains == ["all"] and dataset.vocab_size == 400
    assert dataset.stream("all")[-1] == dataset.eos_id == 0
    assert dataset.tokenizer().digest == dataset.tokenizer_digest


def test_a_domain_with_little_text_is_told(tmp_path, shards, sentencepiece_model):
    rule = HeldOutRule(0.02, 10**6, 32)
    summary = preprocess(job(shards, sentencepiece_model, tmp_path / "dataset", merging=Merging(rule)))
    assert table(summary, rule).count("fewer than 1000000") == 3


def test_an_output_that_is_there_is_left_alone(tmp_path, shards, sentencepiece_model):
    (tmp_path / "dataset").mkdir()
    with pytest.raises(DataError, match="already there"):
        preprocess(job(shards, sentencepiece_model, tmp_path / "dataset"))


def test_two_runs_into_one_output(tmp_path, shards, sentencepiece_model):
    with run_lock(tmp_path / "dataset.parts"), pytest.raises(BusyError, match=r"dataset\.parts: in use"):
        preprocess(job(shards, sentencepiece_model, tmp_path / "dataset"))
