import gzip
import json
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.errors import DataError
from megashear.preprocess import shard_reader as shards
from megashear.preprocess.shard_files import BadLine, Document, ShardPiece, pieces_of
from megashear.preprocess.shard_reader import ShardReader, split_lines

GOOD = [{"text": f"document {n} — naïve 🐍\nsecond line", "meta": {"n": n}} for n in range(20)]
# kind: (the line's bytes, what the reason says)
BAD = {
    "cut json": (b'{"text": "abc', "not JSON"),
    "no json": (b"hello", "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON"),
    "single quotes": (b"{'text': 'a'}", "not JSON"),
    "not a number": (b'{"text": "a", "meta": NaN}', "not JSON"),
    "control character": (b'{"text": "a\x01b"}', "not JSON"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "not JSON"),
    "nul bytes": (b"\0\0\0\0", "not JSON"),
    "nesting bomb": (b'{"text": "a", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    "no utf-8": (b'{"text": "caf\xe9"}', "not UTF-8"),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), "not JSON"),
    "empty line": (b"", "empty line"),
    "blanks": (b"   \t", "empty line"),
    "array": (b'["text"]', "not a JSON object"),
    "string": (b'"text"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no text": (b'{"content": "a"}', "no field 'text'"),
    "text a number": (b'{"text": 7}', "field 'text' is not a string"),
    "text null": (b'{"text": null}', "field 'text' is not a string"),
    "text empty": (b'{"text": ""}', "empty text"),
    "text blank": (b'{"text": " \\n\\t"}', "empty text"),
}
COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}


def lines_of(documents) -> list[bytes]:
    return [json.dumps(document, ensure_ascii=False).encode() for document in documents]


def shard(folder, suffix: str, content: bytes):
    path = folder / f"web_00000{suffix}"
    path.write_bytes(COMPRESS[suffix](content))
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_good_lines(tmp_path, suffix):
    reader = ShardReader(shard(tmp_path, suffix, b"\n".join(lines_of(GOOD)) + b"\n"))
    assert list(reader) == [Document(n + 1, d["text"], d) for n, d in enumerate(GOOD)]
    assert reader.bytes_read == reader.path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_told_and_the_others_are_unchanged(tmp_path, suffix, kind):
    bad, reason = BAD[kind]
    for at in (0, 10, 20):
        lines = lines_of(GOOD)
        lines.insert(at, bad)
        entries = list(ShardReader(shard(tmp_path, suffix, b"\n".join(lines) + b"\n")))
        assert [entry.line for entry in entries] == list(range(1, 22))
        wrong = entries.pop(at)
        assert isinstance(wrong, BadLine) and reason in wrong.reason
        assert [entry.record for entry in entries] == GOOD


def test_the_last_line_needs_no_newline(tmp_path):
    assert len(list(ShardReader(shard(tmp_path, ".jsonl", b"\n".join(lines_of(GOOD)))))) == 20
    assert list(ShardReader(shard(tmp_path, ".jsonl", b""))) == []


LINES = st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=12)


@settings(max_examples=60)
@given(LINES, st.booleans(), st.integers(1, 9))
def test_pieces_together_are_the_whole(tmp_path_factory, lines, ended, count):
    path = tmp_path_factory.mktemp("pieces") / "web.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ended else b""))
    whole = list(ShardReader(path))
    pieces = [list(ShardReader(ShardPiece(path, number, count))) for number in range(count)]
    before, found = 0, []
    for piece in pieces:
        found += [replace(entry, line=entry.line + before) for entry in piece]
        before += len(piece)
    assert found == whole


def test_large_shards_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("megashear.preprocess.shard_files.LARGEST_PIECE", 100)
    for name, count in (("a.jsonl", 3), ("a.parquet", 3), ("a.jsonl.gz", 1), ("a.jsonl.zst", 1)):
        (tmp_path / name).write_bytes(bytes(201))
        assert pieces_of(tmp_path / name) == [ShardPiece(tmp_path / name, n, count) for n in range(count)]
    (tmp_path / "none.jsonl").write_bytes(b"")
    assert len(pieces_of(tmp_path / "none.jsonl")) == 1


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    entries = list(ShardReader(shard(tmp_path, ".jsonl", b"\xef\xbb\xbf" + b"\r\n".join(lines_of(GOOD)))))
    assert [entry.record for entry in entries] == GOOD


def test_another_text_key(tmp_path):
    [entry] = ShardReader(shard(tmp_path, ".jsonl", b'{"content": "x", "text": ""}'), text_key="content")
    assert entry.text == "x"


def test_a_huge_line_is_skipped_without_being_held(monkeypatch):
    monkeypatch.setattr(shards, "LONGEST_LINE", 50)
    chunks = [b"short\n" + b"x" * 40, b"x" * 11, b"x" * 10**6, b"x\nafter\n", b"y" * 51]
    assert list(split_lines(chunks)) == [b"short", None, b"after", None]
    assert list(split_lines([b"z" * 50 + b"\n"])) == [b"z" * 50]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_is_an_error_wherever_it_is_cut(tmp_path, suffix):
    whole = COMPRESS[suffix](b"\n".join(lines_of(GOOD)) + b"\n")
    path = tmp_path / f"web_00000{suffix}"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"web_00000.*truncated"):
            list(ShardReader(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_several_members_or_frames(tmp_path, suffix):
    lines = b"\n".join(lines_of(GOOD)) + b"\n"
    pieces = [COMPRESS[suffix](lines[:300]), COMPRESS[suffix](b""), COMPRESS[suffix](lines[300:])]
    path = tmp_path / f"web_00000{suffix}"
    path.write_bytes(b"".join(pieces))
    assert [entry.record for entry in ShardReader(path)] == GOOD
    path.write_bytes(b"".join(pieces)[:-5])
    with pytest.raises(DataError, match="truncated"):
        list(ShardReader(path))


def test_frames_without_a_size_and_skippable_frames(tmp_path):
    path = tmp_path / "web_00000.jsonl.zst"
    stream = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    frame = stream.compress(b"\n".join(lines_of(GOOD))) + stream.flush()
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    path.write_bytes(skippable + frame + skippable)
    assert [entry.record for entry in ShardReader(path)] == GOOD


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damage_is_an_error(tmp_path, suffix):
    compress = zstandard.ZstdCompressor(write_checksum=True).compress if suffix.endswith("zst") else gzip.compress
    content = bytearray(compress(b"\n".join(lines_of(GOOD)) + b"\n"))
    path = tmp_path / f"web_00000{suffix}"
    path.write_bytes(b"this was never compressed")
    with pytest.raises(DataError, match=r"web_00000.*damaged"):
        list(ShardReader(path))
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match="web_00000"):
        list(ShardReader(path))


def test_padding_after_a_gzip_member(tmp_path):
    path = tmp_path / "web_00000.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines_of(GOOD))) + b"\0" * 512)
    assert [entry.record for entry in ShardReader(path)] == GOOD


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read"):
        list(ShardReader(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        ShardReader(tmp_path / "text.csv")
