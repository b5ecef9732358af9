"""The benchmark of tokenization runs whole, on little text, and compares ids before it takes times."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "bench" / "tokenization.py"


def run(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megashear._csrc") is None, reason="the kernels are not built")
def test_all_forms_are_measured(sentencepiece_model, tmp_path):
    shard = tmp_path / "shard.jsonl"
    shard.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}"}) + "\n" for i in range(400)))
    written = tmp_path / "rows.json"
    options = ("--tokenizer", sentencepiece_model.parent, "--workers", 1, "--rounds", 3, "--json", written)
    done = run(shard, *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads(written.read_text())["rows"]
    forms = [("document", "ours"), ("document", "sentencepiece"), ("run, 1 workers", "ours")]
    assert [(row["what"], row["form"]) for row in rows] == [*forms, ("run, 1 workers", "megatron's way")]
    assert all(row["seconds"] > 0 and row["mtok_per_second"] > 0 for row in rows) and len(done.stdout.split("\n")) == 6


@pytest.mark.parametrize("options, said", [(("--rounds", 2), "3 or more"), (("--workers", 2), "as many shards")])
def test_options_that_measure_nothing(options, said):
    done = run("a.jsonl", "--tokenizer", "folder", *options)
    assert done.returncode == 2 and said in done.stderr
