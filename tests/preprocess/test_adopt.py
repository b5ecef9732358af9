"""Pairs come from megatron-core's own builder."""

import numpy as np
import pytest

from megashear.dataset.dataset_folder import SPLITS, Dataset
from megashear.dataset.tokenizer import load_tokenizer
from megashear.errors import DataError
from megashear.preprocess.adopt import adopt
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging

MERGING = Merging(HeldOutRule(0.05, 2, 64, 0.3))


@pytest.fixture
def tokenizer(sentencepiece_model):
    return load_tokenizer(sentencepiece_model)


@pytest.fixture
def build():
    """Write a pair by Megatron's builder: documents of one or several sequences, lists of token lists."""
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

    def write(prefix, documents, dtype=np.uint16):
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for sequences in documents:
            flat = [token for sequence in sequences for token in sequence]
            builder.add_document(torch.tensor(flat), [len(sequence) for sequence in sequences])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


def random_documents(count, tokenizer, seed=0, sequences=1):
    """Documents that end in the end token, of one or more sequences of up to 40 tokens."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        made.append([random.integers(3, 500, random.integers(1, 40)).tolist() for _ in range(sequences)])
        made[-1][-1].append(tokenizer.eos_id)
    return made


def flat(documents) -> list[list[int]]:
    return [[token for sequence in sequences for token in sequence] for sequences in documents]


def taken(dataset, domain, split) -> list[list[int]]:
    pair = dataset.pair(domain, split)
    return [pair.document(n).tolist() for n in range(pair.documents)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("sequences", [1, 3])
def test_one_pair_a_domain_is_split_by_hash(tmp_path, tokenizer, build, sequences, dtype):
    web, code = random_documents(200, tokenizer, 0, sequences), random_documents(100, tokenizer, 1)
    code += web[:20]
    pairs = {"web": build(tmp_path / "w_text_document", web, dtype), "code": build(tmp_path / "c.x", code)}
    adopt(tmp_path / "d", pairs, {}, tokenizer, MERGING)
    dataset = Dataset.open(tmp_path / "d")
    dataset.verify()
    for name, documents in (("web", web), ("code", code)):
        both = [document for split in SPLITS for document in taken(dataset, name, split)]
        assert sorted(both) == sorted(flat(documents)) and both != flat(documents)
        assert len(dataset.stream(name, "heldout")) >= 2 * 65
    sides = [{tuple(d) for name in pairs for d in taken(dataset, name, split)} for split in SPLITS]
    assert not sides[0] & sides[1]


def test_given_held_out_pairs_stay_as_they_are(tmp_path, tokenizer, build):
    train, held = random_documents(50, tokenizer, 0, 2), random_documents(20, tokenizer, 1)
    pairs, heldout = {"web": build(tmp_path / "t", train)}, {"web": build(tmp_path / "h", held)}
    adopt(tmp_path / "d", pairs, heldout, tokenizer, MERGING)
    dataset = Dataset.open(tmp_path / "d")
    assert taken(dataset, "web", "train") == flat(train) and taken(dataset, "web", "heldout") == flat(held)
    for ours, theirs in (("web.train", "t"), ("web.heldout", "h")):
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"d/{ours}{suffix}").samefile(tmp_path / f"{theirs}{suffix}")
    content = bytearray((tmp_path / "t.bin").read_bytes())
    content[40] ^= 1
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"web\.train\.bin: bytes 0 to"):
        Dataset.open(tmp_path / "d").stream("web")[0:9]


def test_a_document_on_both_sides_is_refused(tmp_path, tokenizer, build):
    train = random_documents(50, tokenizer)
    pairs, heldout = {"web": build(tmp_path / "t", train)}, {"web": build(tmp_path / "h", [train[7]])}
    with pytest.raises(DataError, match=r"t\.bin: document 7 is held out as well"):
        adopt(tmp_path / "d", pairs, heldout, tokenizer, MERGING)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "documents, message",
    [
        ([[[5, 6, 2]], [[5, 6]]], "document 1 does not end in the tokenizer's end token 2; .*--append-eod"),
        ([[[5, 600, 2]]], "a token outside of the tokenizer's 500 ids"),
        ([], "no document in it"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path, tokenizer, build, documents, message):
    with pytest.raises(DataError, match=message):
        adopt(tmp_path / "d", {"web": build(tmp_path / "w", documents)}, {}, tokenizer, MERGING)


@pytest.mark.parametrize("at, value", [(34, 1), (34 + 4 * 50, 2), (34 + 12 * 50 + 8, 9)])
def test_an_index_that_jumps_is_refused(tmp_path, tokenizer, build, at, value):
    """A length, an offset or a bound that is not what the others say."""
    prefix = build(tmp_path / "w", random_documents(50, tokenizer))
    content = bytearray((tmp_path / "w.idx").read_bytes())
    content[at] += value
    (tmp_path / "w.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"w\.(idx|bin)"):
        adopt(tmp_path / "d", {"web": prefix}, {}, tokenizer, MERGING)
