"""The quick start: text without repeats, a tokenizer that loses nothing, run files that agree, and all of it once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megashear.config.load import load_config
from megashear.dataset.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
DOMAINS = {"python", "docs", "packages", "cpp"}


def python(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "text"
    done = python(QUICKSTART / "collect_text.py", folder, "0.05")
    assert done.returncode == 0, done.stderr
    return folder


def documents(text: Path) -> dict[str, list[str]]:
    return {
        path.name.removesuffix("_00000.jsonl"): [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in text.glob("*.jsonl")
    }


def test_text_of_four_domains_without_repeats(text: Path) -> None:
    found = documents(text)
    assert found.keys() == DOMAINS
    everything = [document for domain in found.values() for document in domain]
    assert len(set(everything)) == len(everything) > 100
    assert all(200 <= len(document) <= 12_000 for document in everything)
    assert all(sum(map(len, domain)) > 50_000 for domain in found.values())


def test_text_is_the_same_each_time(text: Path, tmp_path: Path) -> None:
    assert python(QUICKSTART / "collect_text.py", tmp_path / "again", "0.05").returncode == 0
    assert documents(tmp_path / "again") == documents(text)


def test_the_tokenizer_gives_every_text_back(text: Path, tmp_path: Path) -> None:
    done = python(QUICKSTART / "train_tokenizer.py", text, tmp_path / "tokenizer", 600)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (600, 0)
    samples = [document for domain in documents(text).values() for document in domain[:5]]
    for sample in [*samples, "\n\n    tab\t and  blanks \r\n", "Ω ≈ 3.14159, ½ of \U0001f600", "_x__init__ 2026"]:
        ids = tokenizer.encode(sample)
        assert tokenizer.decode(ids) == sample
        assert 0 not in ids
    digits = tokenizer.encode("31415926")
    assert len(digits) == 8


def test_transformers_loads_the_tokenizer_with_equal_ids(text: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert python(QUICKSTART / "train_tokenizer.py", text, tmp_path / "tokenizer", 600).returncode == 0
    ours, theirs = load_tokenizer(tmp_path / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for sample in documents(text)["python"][:5]:
        assert theirs(sample)["input_ids"] == ours.encode(sample).tolist()


@pytest.mark.parametrize("script", ["collect_text.py", "train_tokenizer.py", "summarise.py"])
def test_a_wrong_command_line_is_answered_with_the_usage(script: str) -> None:
    done = python(QUICKSTART / script)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_source_shear_and_scratch_agree() -> None:
    source, shear, scratch = (load_config(QUICKSTART / f"{name}.yaml") for name in ("source", "shear", "scratch"))
    assert shear.source.folder == f"{source.run.folder}/final"
    assert source.data == shear.data == scratch.data
    given = yaml.safe_load((QUICKSTART / "scratch.yaml").read_text())["source"]["shape"]
    target = yaml.safe_load((QUICKSTART / "shear.yaml").read_text())["target"]
    assert target.items() <= given.items()
    assert given["head_dim"] * source.source.shape.num_heads == source.source.shape.hidden_size
    steps = [phase.batch.steps * phase.batch.global_batch for phase in (shear.prune, shear.pretrain, scratch.pretrain)]
    assert steps[0] + steps[1] == steps[2]


@pytest.mark.parametrize("name", ["quickstart/source", "quickstart/shear", "quickstart/scratch", "smollm2/shear"])
def test_run_files_pass_the_check_on_two_ranks(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megashear", "check", str(ROOT / "examples" / f"{name}.yaml")]
    shape = []
    if name == "smollm2/shear":
        sizes = {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_query_groups": 3, "intermediate_size": 1536}
        sizes |= {"vocab_size": 49152, "tie_word_embeddings": "true"}
        shape = [f"source.shape.{key}={value}" for key, value in sizes.items()]
    elif name != "quickstart/shear":
        shape = ["source.shape.vocab_size=2048"]
    else:
        given = yaml.safe_load((QUICKSTART / "source.yaml").read_text())["source"]["shape"]
        shape = [f"source.shape.{key}={value}" for key, value in given.items()] + ["source.shape.vocab_size=2048"]
    done = subprocess.run(
        [*command, "parallel.world_size=2", *shape], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    if name.endswith("shear"):
        row = next(line for line in done.stdout.splitlines() if line.startswith("parameters"))
        assert 45 < float(row.split()[-1].rstrip("%")) < 55


@pytest.mark.slow
def test_the_whole_quick_start_with_a_few_steps(tmp_path: Path) -> None:
    """Everything but the results: installed, made, interrupted by nothing, and not made again the second time."""
    command = ["bash", str(ROOT / "examples" / "quickstart.sh"), "--tiny", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["losses"]) == ["source", "pruned", "final", "scratch"]
    for column in summary["losses"].values():
        assert column.keys() == DOMAINS
        assert all(0 < loss < 12 for loss in column.values())
    assert 0.45 < summary["parameters"]["final"] / summary["parameters"]["source"] < 0.55
    assert summary["tokens"]["scratch"] == summary["tokens"]["prune"] + summary["tokens"]["pretrain"]
    assert {"text", "data", "source", "prune", "pretrain", "scratch", "all"} <= summary["seconds"].keys()
    assert summary["export"] == str(tmp_path / "run" / "sheared" / "export")
    assert list((tmp_path / "run" / "sheared" / "plots").glob("*.png"))
    assert "LlamaForCausalLM" in done.stdout

    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("already done") == 6
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
