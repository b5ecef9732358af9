import gzip
import json
import math
import random
from dataclasses import replace

import pytest

from megashear.errors import DataError
from megashear.preprocess.build_dataset import Preprocessing, preprocess
from megashear.preprocess.domains import DomainRule
from megashear.preprocess.estimate import clock, estimate, estimate_text, sampled
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging
from megashear.preprocess.tokenized_parts import PartSettings


@pytest.fixture
def job(tmp_path, texts, sentencepiece_model):
    """40 shards of two domains by name, a tenth of the lines of a third by their field; code is gzipped."""
    dice = random.Random(0)
    (tmp_path / "in").mkdir()
    for number in range(40):
        lines = []
        for text in dice.choices(texts, k=60):
            lines.append({"text": text} | ({"domain": "rare"} if dice.random() < 0.1 else {}))
        content = "".join(json.dumps(line) + "\n" for line in lines).encode() + (b"{broken\n" if number % 4 else b"")
        if number % 2:
            (tmp_path / f"in/code_{number:05d}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / f"in/web_{number:05d}.jsonl").write_bytes(content)
    return Preprocessing(
        inputs=[str(tmp_path / "in")],
        tokenizer=sentencepiece_model,
        output=tmp_path / "out" / "d",
        merging=Merging(HeldOutRule(0.02, 10, 32)),
        part=PartSettings(rule=DomainRule(key="domain")),
        max_bad_fraction=0.1,
        workers=1,
    )


def test_a_sample_is_near_what_the_run_gives(job, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = estimate(job, shards_sampled=20, limit=1 << 14)
    assert sorted(tmp_path.rglob("*")) == before
    summary = preprocess(job)
    true = {name: sum(split["tokens"] for split in splits.values()) for name, splits in summary.counts.items()}
    assert found.tokens.keys() == true.keys() == {"code", "rare", "web"}
    assert (found.shards, found.sampled_shards) == (40, 20) and found.sampled_bytes < found.bytes
    assert abs(sum(found.tokens.values()) / sum(true.values()) - 1) < min(0.15, 5 * found.error)
    for name in ("code", "web"):
        assert abs(found.tokens[name] / true[name] - 1) < 0.2
    size = sum(p.stat().st_size for p in job.output.glob("*.*") if p.suffix in (".bin", ".idx"))
    assert abs(found.final_bytes / size - 1) < 0.2
    assert 0 < found.bad_fraction < 0.03


def test_all_shards_whole_is_exact(job):
    found = estimate(job, shards_sampled=40, limit=1 << 30)
    assert found.error == 0.0 and found.sampled_bytes == found.bytes
    summary = preprocess(job)
    for name, splits in summary.counts.items():
        assert abs(found.tokens[name] - sum(split["tokens"] for split in splits.values())) <= 20
    text = estimate_text(found, 3)
    assert "40 of 40 shards" in text and "with 3 workers" in text and "tokens +- 0.0%" in text


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_parquet_is_sampled_without_bias(job, tmp_path, limit):
    """Rows of one size: a part of the file has its share of the tokens to within a batch of rows."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [random.Random(number).randbytes(100).hex() for number in range(2000)]  # compression finds little in them
    pq.write_table(pa.table({"text": rows}), tmp_path / "web_0.parquet", use_dictionary=False)
    found = estimate(replace(job, inputs=[str(tmp_path / "web_0.parquet")]), limit=limit)
    assert found.documents["web"] == pytest.approx(2000, rel=0.02)
    assert (found.sampled_bytes == found.bytes) == (limit == 1 << 30)


def test_one_shard_of_many_tells_no_error(job):
    found = estimate(job, shards_sampled=1, limit=1 << 14)
    assert found.sampled_shards == 2 and math.isnan(found.error)
    assert "+-" not in estimate_text(found, 1)


def test_inputs_are_refused_as_by_a_run(job, tmp_path):
    (tmp_path / "in" / "web_00000.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="damaged gzip"):
        estimate(job, shards_sampled=41)


def test_shards_are_spread_evenly():
    assert sampled(list("abcdefghij"), 2) == ["c", "h"] and sampled(list("abc"), 9) == ["a", "b", "c"]
    assert sampled(list("abc"), 0) == ["b"] and clock(3661.2) == "1:01:02"
