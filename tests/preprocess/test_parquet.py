import json
import random
import sys

import pytest

from megashear.dataset.indexed import token_dtype
from megashear.dataset.tokenizer import load_tokenizer
from megashear.errors import DataError
from megashear.preprocess.domains import DomainRule
from megashear.preprocess.shard_files import BadLine, Document, ShardPiece
from megashear.preprocess.shard_reader import ShardReader
from megashear.preprocess.tokenized_parts import PartSettings, open_part, write_part

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {n} — naïve 🐍\nsecond line" for n in range(20)]
# kind: (the row's text as bytes or None, the row's domain, what the reason says)
BAD = {
    "null": (None, b"web", "field 'text' is null"),
    "empty": (b"", b"web", "empty text"),
    "blank": (b" \n\t", b"web", "empty text"),
    "latin-1": (b"caf\xe9", b"web", "not UTF-8 (byte 3)"),
    "utf-16": ("ää".encode("utf-16-le"), b"web", "not UTF-8"),
    "lone surrogate": (b"a\xed\xa0\x80b", b"web", "not UTF-8 (byte 1)"),
    "overlong": (b"\xc0\x80", b"web", "not UTF-8"),
    "cut character": ("é".encode()[:1], b"web", "not UTF-8"),
    "the domain is not utf-8": (b"fine", b"\xff", "field 'domain' is not UTF-8"),
}


def write(path, texts, kind=None, domains=None, **options):
    """A file with a column of texts, given as str, bytes or None, and one of domains."""
    raw = pa.array([t.encode() if isinstance(t, str) else t for t in texts], pa.binary())
    columns = {"text": raw.cast(kind or pa.binary(), safe=False) if kind != pa.string() else as_string(raw)}
    if domains is not None:
        columns["domain"] = as_string(pa.array(domains, pa.binary()))
    columns["other"] = pa.array(range(len(texts)))
    pq.write_table(pa.table(columns), path, **{"row_group_size": 7, **options})
    return path


def as_string(raw):
    """Bytes under the name of a string, unchecked, as a careless writer leaves them."""
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_good_rows(tmp_path, compression):
    reader = ShardReader(write(tmp_path / "web.parquet", TEXTS, compression=compression))
    assert list(reader) == [Document(n + 1, text, {"text": text}) for n, text in enumerate(TEXTS)]
    assert reader.bytes_read == reader.path.stat().st_size


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.large_string(), pa.large_binary()])
def test_types_of_the_text(tmp_path, kind):
    entries = list(ShardReader(write(tmp_path / "web.parquet", TEXTS, kind)))
    assert [entry.text for entry in entries] == TEXTS


def test_a_dictionary_of_texts(tmp_path):
    table = pa.table({"text": pa.array(["a", "b", "a", None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "web.parquet")
    entries = list(ShardReader(tmp_path / "web.parquet"))
    assert [getattr(entry, "text", None) for entry in entries] == ["a", "b", "a", None]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_told_and_the_others_are_unchanged(tmp_path, kind):
    text, domain, reason = BAD[kind]
    for at in (0, 10, 20):
        texts, domains = list(TEXTS), [b"web"] * 20
        texts.insert(at, text)
        domains.insert(at, domain)
        path = write(tmp_path / "web.parquet", texts, pa.string(), domains)
        entries = list(ShardReader(path, keys=("domain",)))
        assert [entry.line for entry in entries] == list(range(1, 22))
        wrong = entries.pop(at)
        assert isinstance(wrong, BadLine) and reason in wrong.reason
        assert [entry.record for entry in entries] == [{"text": text, "domain": "web"} for text in TEXTS]


def test_domains_from_structs_and_from_json(tmp_path, sentencepiece_model):
    names = ["RedPajamaC4", "RedPajamaBook", None]
    tokenizer = load_tokenizer(sentencepiece_model)
    forms = {
        "struct": pa.array([{"redpajama_set_name": name} for name in names]),
        "json": pa.array([json.dumps({"redpajama_set_name": name}) if name else None for name in names]),
    }
    for form, column in forms.items():
        pq.write_table(pa.table({"meta": column, "text": pa.array(["a", "b", "c"])}), tmp_path / f"{form}_0.parquet")
        folder = tmp_path / f"{form}.part"
        piece = ShardPiece(tmp_path / f"{form}_0.parquet")
        write_part(folder, piece, tokenizer, PartSettings(rule=DomainRule()), lambda *_: None)
        part = open_part(folder, token_dtype(tokenizer.vocab_size))
        (table,) = part.table.chunks()
        assert [part.domains[i] for i in table["domain"]] == ["RedPajamaC4", "RedPajamaBook", form]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pieces_together_are_the_whole(tmp_path, count):
    path = write(tmp_path / "web.parquet", TEXTS)  # three row groups
    found = [list(ShardReader(ShardPiece(path, number, count))) for number in range(count)]
    assert [entry.text for piece in found for entry in piece] == TEXTS
    assert all([entry.line for entry in piece] == list(range(1, len(piece) + 1)) for piece in found)
    assert sum(map(bool, found)) == min(count, 3)


def test_a_huge_row_is_a_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megashear.preprocess.parquet.LONGEST_LINE", 50)
    first, second = ShardReader(write(tmp_path / "web.parquet", ["x" * 51, "x" * 50]))
    assert first.reason == "longer than 50 bytes" and second.text == "x" * 50


def test_a_row_group_is_not_held_in_memory(tmp_path):
    """32 MiB of text in one row group; pyarrow's own count of what it holds stays below a quarter."""
    texts = [random.Random(n).randbytes(1 << 11).hex() for n in range(1 << 13)]
    options = {"row_group_size": 1 << 13, "use_dictionary": False, "write_batch_size": 64}
    path = write(tmp_path / "web.parquet", texts, pa.string(), **options)
    del texts
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for entry in ShardReader(path):
        most, count = max(most, pa.total_allocated_bytes() - before), count + len(entry.text)
    assert count == 1 << 25
    assert most < 1 << 23


def test_a_truncated_file_is_an_error_wherever_it_is_cut(tmp_path):
    whole = write(tmp_path / "web.parquet", TEXTS).read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "web.parquet").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"web\.parquet: truncated or damaged"):
            list(ShardReader(tmp_path / "web.parquet"))


def test_damage_is_an_error_where_pages_carry_checksums(tmp_path):
    """A flipped bit in a page: never other text. In the footer: never a crash."""
    path = write(tmp_path / "web.parquet", TEXTS, compression="zstd", write_page_checksum=True)
    whole, dice = path.read_bytes(), random.Random(0)
    good = [Document(n + 1, text, {"text": text}) for n, text in enumerate(TEXTS)]
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for _ in range(150):
        damaged, at = bytearray(whole), dice.randrange(len(whole))
        damaged[at] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            found = list(ShardReader(path))
        except DataError as error:
            assert "web.parquet" in str(error)
        else:
            assert found == good or at >= footer


@pytest.mark.parametrize(
    "table, message",
    [
        ({"content": ["a"]}, r"no one column 'text' \(it has content\); give --text-key"),
        ({"text": [1, 2]}, "'text' is of type int64"),
        ({"text": [["a"], ["b"]]}, "'text' is of type list"),
        ({"text": [None, None]}, "'text' is of type null"),
    ],
)
def test_a_file_without_a_column_of_text(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "web.parquet")
    with pytest.raises(DataError, match=message):
        list(ShardReader(tmp_path / "web.parquet"))


def test_no_rows_and_no_file(tmp_path):
    assert list(ShardReader(write(tmp_path / "web.parquet", []))) == []
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
        list(ShardReader(tmp_path / "none.parquet"))


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "web.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"web\.parquet: parquet needs pyarrow.*pip install pyarrow"):
        list(ShardReader(path))
