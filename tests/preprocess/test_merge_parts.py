import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.dataset.dataset_folder import SPLITS, Dataset
from megashear.dataset.indexed import token_dtype
from megashear.dataset.samples import Permutation
from megashear.dataset.tokenizer import load_tokenizer
from megashear.errors import DataError
from megashear.preprocess import document_order, tokenized_parts
from megashear.preprocess.document_order import Documents, Layout
from megashear.preprocess.domains import DomainRule
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging, merge_parts
from megashear.preprocess.shard_files import ShardPiece
from megashear.preprocess.tokenized_parts import (
    DOCUMENT,
    DocumentTable,
    Part,
    PartSettings,
    open_part,
    part_name,
    text_digest,
    write_part,
)

ROOT = Path(__file__).resolve().parents[2]
RULE = HeldOutRule(0.05, 10, 32)


def make_parts(folder, shards: dict[str, list[dict]], tokenizer, part_settings=None) -> list[Part]:
    """Shards written as JSON lines and made into parts, in order of their names."""
    part_settings = part_settings or PartSettings(rule=DomainRule(key="domain"))
    parts = []
    for name in sorted(shards):
        path = folder / name
        path.write_text("".join(json.dumps(entry) + "\n" for entry in shards[name]))
        write_part(folder / f"{name}.part", ShardPiece(path), tokenizer, part_settings, lambda *_: None)
        parts.append(open_part(folder / f"{name}.part", token_dtype(tokenizer.vocab_size)))
    return parts


def merge(folder, parts, tokenizer, rule=RULE, seed=0, drop=False) -> Dataset:
    folder.mkdir()
    merge_parts(folder, parts, tokenizer, Merging(rule, seed, drop), {})
    return Dataset.open(folder)


def documents(dataset: Dataset, domain: str, split: str) -> list[str]:
    pair = dataset.pair(domain, split)
    ids = [pair.document(number) for number in range(pair.documents)]
    assert all(document[-1] == dataset.eos_id for document in ids)
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(document[:-1]) for document in ids]


@pytest.fixture
def tokenizer(sentencepiece_model):
    return load_tokenizer(sentencepiece_model)


@pytest.fixture
def shards(texts):
    entries = [{"text": text, "domain": "code" if n % 3 else "web"} for n, text in enumerate(texts[:300])]
    return {"a_00000.jsonl": entries[:120], "b_00000.jsonl": entries[120:]}


def test_every_document_stands_once_in_its_domain(tmp_path, tokenizer, shards):
    dataset = merge(tmp_path / "dataset", make_parts(tmp_path, shards, tokenizer), tokenizer)
    entries = shards["a_00000.jsonl"] + shards["b_00000.jsonl"]
    for domain in ("code", "web"):
        found = [text for split in SPLITS for text in documents(dataset, domain, split)]
        assert sorted(found) == sorted(entry["text"] for entry in entries if entry["domain"] == domain)
        assert len(dataset.stream(domain, "heldout")) >= 10 * 33
    assert dataset.domains == ["code", "web"]


def test_documents_are_shuffled_over_the_shards(tmp_path, tokenizer, shards):
    parts = make_parts(tmp_path, shards, tokenizer)
    place = {entry["text"]: n for n, entry in enumerate(shards["a_00000.jsonl"] + shards["b_00000.jsonl"])}
    order = [place[text] for text in documents(merge(tmp_path / "d", parts, tokenizer), "code", "train")]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3
    other = [place[text] for text in documents(merge(tmp_path / "e", parts, tokenizer, seed=1), "code", "train")]
    assert sorted(order) == sorted(other) and order != other


def test_equal_texts_stand_on_one_side_also_across_domains(tmp_path, tokenizer, texts):
    """The rare domain holds out more to reach its least: what it holds out leaves the other domain's training too."""
    common = [{"text": text, "domain": "web"} for text in texts[:400]]
    rare = [{"text": text, "domain": "rare"} for text in texts[:40]]
    parts = make_parts(tmp_path, {"a.jsonl": common + rare, "b.jsonl": common[:50]}, tokenizer)
    dataset = merge(tmp_path / "dataset", parts, tokenizer, HeldOutRule(0.01, 20, 32, limit=0.5))
    held = {text for domain in dataset.domains for text in documents(dataset, domain, "heldout")}
    train = {text for domain in dataset.domains for text in documents(dataset, domain, "train")}
    assert held and not held & train
    assert set(documents(dataset, "rare", "heldout")) <= set(documents(dataset, "web", "heldout"))


def test_a_domain_that_would_be_held_out_whole(tmp_path, tokenizer, texts):
    by_hash = sorted(texts[:50], key=lambda text: int.from_bytes(text_digest(text.encode())[:8], "little"))
    entries = [{"text": text, "domain": "web"} for text in by_hash]
    parts = make_parts(tmp_path, {"a.jsonl": [*entries, {"text": by_hash[0], "domain": "one"}]}, tokenizer)
    with pytest.raises(DataError, match="'one': every one of its 1 documents"):
        merge(tmp_path / "dataset", parts, tokenizer, HeldOutRule(0.01, 1, 32, limit=1.0))


def test_duplicates_are_counted_and_dropped_on_request(tmp_path, tokenizer, texts):
    """The first copy in the order of shards and lines stays, whatever its domain."""
    first = [{"text": text, "domain": "web"} for text in texts[:60]]
    again = [{"text": text, "domain": "code"} for text in texts[50:90]] + first[:5]
    parts = make_parts(tmp_path, {"a.jsonl": [*first, first[7]], "b.jsonl": again}, tokenizer)
    kept = merge(tmp_path / "kept", parts, tokenizer)
    dropped = merge(tmp_path / "dropped", parts, tokenizer, drop=True)
    for dataset, drop in ((kept, False), (dropped, True)):
        assert dataset.manifest["duplicates"] == {"found": {"code": 10, "web": 6}, "dropped": drop}
    found = {domain: [t for s in SPLITS for t in documents(dropped, domain, s)] for domain in dropped.domains}
    assert sorted(found["web"]) == sorted(texts[:60]) and sorted(found["code"]) == sorted(texts[60:90])
    assert len([t for d in kept.domains for s in SPLITS for t in documents(kept, d, s)]) == 106
    assert "10" in (kept.folder / "report.txt").read_text()


def test_a_domain_of_duplicates_alone(tmp_path, tokenizer, texts):
    entries = [{"text": text, "domain": domain} for domain in ("web", "copy") for text in texts[:30]]
    parts = make_parts(tmp_path, {"a.jsonl": entries}, tokenizer)
    with pytest.raises(DataError, match="'copy': every one of its 30 documents stood earlier"):
        merge(tmp_path / "dataset", parts, tokenizer, drop=True)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["web", "code", "rare"])), min_size=40, max_size=120),
    st.floats(0.0, 0.3),
    st.booleans(),
)
def test_no_document_stands_on_both_sides(tmp_path_factory, sentencepiece_model, entries, fraction, drop):
    """R4: any mix of duplicates within and across domains and shards, duplicates dropped or not."""
    tokenizer, folder = load_tokenizer(sentencepiece_model), tmp_path_factory.mktemp("both")
    lines = [{"text": f"text {n}", "domain": domain} for n, domain in entries]
    parts = make_parts(folder, {"a.jsonl": lines[:20], "b.jsonl": lines[20:]}, tokenizer)
    try:
        dataset = merge(folder / "d", parts, tokenizer, HeldOutRule(fraction, 3, 4, 0.3), drop=drop)
    except DataError as error:
        assert "every one of its" in str(error)
        return
    sides = {s: [t for d in dataset.domains for t in documents(dataset, d, s)] for s in SPLITS}
    assert not set(sides["train"]) & set(sides["heldout"])
    together = sorted(sides["train"] + sides["heldout"])
    assert together == sorted({line["text"] for line in lines} if drop else [line["text"] for line in lines])


def test_a_piece_is_any_number_of_documents(tmp_path, tokenizer, shards, monkeypatch):
    parts = make_parts(tmp_path, shards, tokenizer)
    whole = merge(tmp_path / "whole", parts, tokenizer)
    monkeypatch.setattr("megashear.preprocess.merge_parts.PIECE", 100)
    pieces = merge(tmp_path / "pieces", parts, tokenizer)
    for path in whole.folder.glob("*.*"):
        assert path.read_bytes() == (pieces.folder / path.name).read_bytes()


@pytest.mark.parametrize("records", [1, 7])
def test_buckets_of_any_size(tmp_path, tokenizer, shards, monkeypatch, records):
    """Tables are read and places kept some documents at a time; the dataset does not depend on how many."""
    parts = make_parts(tmp_path, shards, tokenizer)
    whole = merge(tmp_path / "whole", parts, tokenizer)
    for name in ("document_order.RECORDS", "tokenized_parts.CHUNK", "document_order.WAITING"):
        monkeypatch.setattr(f"megashear.preprocess.{name}", records)
    pieces = merge(tmp_path / "pieces", parts, tokenizer)
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in pieces.folder.iterdir())
    for path in whole.folder.glob("*.*"):
        assert path.read_bytes() == (pieces.folder / path.name).read_bytes()


def test_the_order_is_the_permutation_of_the_documents_numbers(tmp_path, tokenizer, shards):
    """Each pair beside its documents in the order of the shards, permuted in memory."""
    parts = make_parts(tmp_path, shards, tokenizer)
    dataset = merge(tmp_path / "dataset", parts, tokenizer, seed=3)
    entries = shards["a_00000.jsonl"] + shards["b_00000.jsonl"]
    for domain in dataset.domains:
        for split in SPLITS:
            found = documents(dataset, domain, split)
            mine = [e["text"] for e in entries if e["domain"] == domain and e["text"] in set(found)]
            order = Permutation(len(mine), 3, domain, split)(np.arange(len(mine)))
            assert found == [mine[number] for number in order]


def peak_bytes(folder: Path, count: int) -> int:
    """What merging `count` documents allocates at most."""
    document_order.RECORDS = tokenized_parts.CHUNK = document_order.WAITING = 1 << 13
    table = np.zeros(count, DOCUMENT)
    table["hash"] = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    table["check"], table["length"], table["bytes"] = table["hash"], 1, 1
    table.tofile(folder / "documents.bin")
    del table
    tracemalloc.start()
    found = Documents([part_of_table(folder)], False, folder)
    held_U = found.held_out(HeldOutRule(0.005, 10, 32))
    (folder / "places").mkdir()
    layout = Layout(found, held_U, [(0, "web", split) for split in SPLITS], folder / "places")
    assert sum(len(place_N) for pair in (0, 1) for place_N in layout.places(pair)) == count
    return tracemalloc.get_traced_memory()[1]


@pytest.mark.medium
def test_merging_holds_no_table_of_documents(tmp_path):
    """600 000 documents more: one byte each for duplicates, and what waits to be freed; their tables would have 28.

    In processes of their own: threads that other tests left would be measured too.
    """
    code = "import sys; from pathlib import Path; from preprocess.test_merge_parts import peak_bytes; "
    code += "print(peak_bytes(Path(sys.argv[1]), int(sys.argv[2])))"
    peaks = []
    for count in (200_000, 800_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        command = [sys.executable, "-c", code, str(folder), str(count)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 6 * 600_000, peaks


def part_of_table(folder) -> Part:
    """A part of the documents in `documents.bin`, all of the domain web; its tokens are not needed."""
    table = DocumentTable(folder / "documents.bin")
    return Part(["web"], table, len(table), folder / "tokens.bin", np.dtype(np.uint16))


def test_no_document_at_all(tmp_path, tokenizer):
    parts = make_parts(tmp_path, {"a.jsonl": [{"text": ""}]}, tokenizer)
    with pytest.raises(DataError, match="no document in all shards"):
        merge(tmp_path / "dataset", parts, tokenizer)


def test_a_parts_name_depends_on_all_that_its_bytes_do(tmp_path, tokenizer, tokenizer_json):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    base = part_name(ShardPiece(path), tokenizer, PartSettings())
    assert base == part_name(ShardPiece(path), tokenizer, PartSettings())
    others = {
        part_name(ShardPiece(path), load_tokenizer(tokenizer_json), PartSettings()),
        part_name(ShardPiece(path), tokenizer, PartSettings(text_key="content")),
        part_name(ShardPiece(path), tokenizer, PartSettings(rule=DomainRule(fixed="x"))),
    }
    path.write_text('{"text": "ab"}\n')
    others.add(part_name(ShardPiece(path), tokenizer, PartSettings()))
    assert len(others) == 4 and base not in others


@pytest.mark.parametrize("file", ["tokens.bin", "documents.bin", "part.json"])
def test_a_damaged_part_is_refused(tmp_path, tokenizer, shards, file):
    make_parts(tmp_path, shards, tokenizer)
    path = tmp_path / "a_00000.jsonl.part" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a_00000\.jsonl\.part: a damaged part"):
        open_part(path.parent, token_dtype(tokenizer.vocab_size))
