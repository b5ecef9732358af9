"""R2: bad lines of every kind, in every format, change nothing of what the good lines give."""

import json

import pytest

from megashear.dataset.tokenizer import Tokenizer, load_tokenizer
from megashear.preprocess.shard_files import ShardPiece
from megashear.preprocess.tokenized_parts import PartSettings, write_part
from preprocess.test_parquet import BAD as BAD_ROWS
from preprocess.test_parquet import write as write_parquet
from preprocess.test_shard_reader import BAD, COMPRESS

GOOD = [f"document {n} — naïve 🐍\nsecond line" for n in range(12)]
PLACES = (0, 6, 12)  # first, middle, last


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_model) -> Tokenizer:
    return load_tokenizer(sentencepiece_model)


def spread(good: list, bad: list) -> list:
    """All of `bad` before, amid and behind `good`."""
    return [*bad, *good[: PLACES[1]], *bad, *good[PLACES[1] :], *bad]


def make(folder, shard, tokenizer) -> dict[str, bytes]:
    """The bytes of a shard's part."""
    write_part(folder, ShardPiece(shard), tokenizer, PartSettings(), lambda *_: None)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compare(dirty: dict[str, bytes], clean: dict[str, bytes], bad: int, shard) -> None:
    """The good documents are the same bytes; every bad line is kept with file, number and reason."""
    assert {name: dirty[name] for name in ("tokens.bin", "documents.bin")} == {
        name: clean[name] for name in ("tokens.bin", "documents.bin")
    }
    told = [json.loads(line) for line in dirty["bad_lines.jsonl"].decode().splitlines()]
    numbers = [*range(bad), *range(bad + 6, 2 * bad + 6), *range(2 * bad + 12, 3 * bad + 12)]
    assert [entry["line"] - 1 for entry in told] == numbers
    assert all(entry["file"] == str(shard) and entry["reason"] for entry in told)
    described = json.loads(dirty["part.json"])
    assert (described["lines"], described["bad"], described["documents"]) == (3 * bad + 12, 3 * bad, 12)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_kinds_of_bad_lines_at_once(tmp_path, tokenizer, suffix):
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    bad = [line for line, _ in BAD.values()]
    parts = []
    for name, lines in (("clean", good), ("dirty", spread(good, bad))):
        (tmp_path / name).mkdir()
        shard = tmp_path / name / f"web_0{suffix}"
        shard.write_bytes(COMPRESS[suffix](b"\n".join(lines) + b"\n"))
        parts.append(make(tmp_path / f"{name}.part", shard, tokenizer))
    compare(parts[1], parts[0], len(bad), shard)


def test_all_kinds_of_bad_rows_at_once(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    bad = [text for text, domain, _ in BAD_ROWS.values() if domain == b"web"]
    parts = []
    for name, rows in (("clean", GOOD), ("dirty", spread(GOOD, bad))):
        (tmp_path / name).mkdir()
        shard = write_parquet(tmp_path / name / "web_0.parquet", rows, pa.string())
        parts.append(make(tmp_path / f"{name}.part", shard, tokenizer))
    compare(parts[1], parts[0], len(bad), shard)
