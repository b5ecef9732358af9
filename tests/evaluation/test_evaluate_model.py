"""`megashear eval`: losses are transformers' own, on every layout; and what it refuses."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.inputs import TEXTS, make_dataset, make_tokenizer
from helpers.ranks import LiveRanks
from helpers.tiny import Tiny
from megashear import cli
from megashear.dataset.dataset_folder import Dataset
from megashear.evaluation.losses import read_sequences
from megashear.mixture.loader import HeldOut
from megashear.report.run_record import read_run

LENGTH, SEQUENCES = 32, 7


@pytest.fixture(scope="module")
def oracle(tiny: Tiny, unbroken_folder: Path) -> dict[str, tuple[float, float]]:
    """Loss and standard error by domain of the final model: by transformers in fp32, window by window."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(unbroken_folder / "final", dtype=torch.float32).eval()
    heldout = HeldOut(Dataset.open(tiny.data), LENGTH, SEQUENCES)
    losses: dict[str, list[float]] = {name: [] for name in heldout.names}
    for row, (domain, _) in enumerate(heldout.rows):
        tokens = heldout.read([row])[0].long()
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0].double()
        losses[heldout.names[domain]].append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    return {name: (float(np.mean(own)), float(np.std(own, ddof=1)) / len(own) ** 0.5) for name, own in losses.items()}


def check(found: dict, oracle: dict[str, tuple[float, float]]) -> None:
    assert list(found["losses"]) == list(oracle)
    for name, (loss, error) in oracle.items():
        assert found["losses"][name] == pytest.approx(loss, rel=1e-5)
        assert found["errors"][name] == pytest.approx(error, rel=1e-4)
        assert found["perplexities"][name] == pytest.approx(np.exp(loss), rel=1e-4)


def arguments(model: Path, data: Path, output: Path) -> list[str]:
    sizes = ["--sequence-length", str(LENGTH), "--sequences", str(SEQUENCES)]
    return ["eval", str(model), str(data), *sizes, "--json", str(output)]


@pytest.mark.parametrize("name", ["", "final"])
def test_a_run_folder_and_a_model_folder(
    tiny: Tiny, unbroken_folder: Path, oracle: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert cli.main(arguments(unbroken_folder / name, tiny.data, tmp_path / "out.json")) == 0
    check(json.loads((tmp_path / "out.json").read_text()), oracle)
    text = capsys.readouterr().out
    assert f"{oracle['library'][0]:.4f} +- {oracle['library'][1]:.4f}" in text
    assert "ppl" in text


def test_the_losses_of_a_finished_run_are_these(unbroken_folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert cli.main([*arguments(unbroken_folder, tiny.data, tmp_path / "out.json"), "--sequences", "5"]) == 0
    recorded = json.loads((unbroken_folder / "pretrain/done.json").read_text())
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["losses"] == pytest.approx(recorded["losses"], rel=1e-6)
    assert found["errors"] == pytest.approx(recorded["errors"], rel=1e-5)


def test_a_finished_run_keeps_the_losses_of_its_sequences(unbroken_folder: Path) -> None:
    texts = []
    for phase in ("prune", "finalize", "pretrain"):
        recorded = json.loads((unbroken_folder / phase / "done.json").read_text())
        found = read_sequences(unbroken_folder / phase)
        assert {name: float(one.loss_N.mean()) for name, one in found.items()} == recorded["losses"]
        texts.append({name: one.text for name, one in found.items()})
    assert texts[0] == texts[1] == texts[2]
    assert read_run(unbroken_folder).sequences.keys() == texts[2].keys()


@pytest.mark.parametrize("tensor", [1, 2])
def test_on_two_ranks(
    ranks: LiveRanks, tiny: Tiny, unbroken_folder: Path, oracle: dict, tmp_path: Path, tensor: int
) -> None:
    """Data parallel, where the last wave of sequences is not full; tensor parallel."""
    ours = arguments(unbroken_folder, tiny.data, tmp_path / "out.json")
    done = ranks(2).call("helpers.jobs:command", arguments=[*ours, "--tensor", str(tensor)])
    assert done["code"] == 0, done["errors"]
    check(json.loads((tmp_path / "out.json").read_text()), oracle)
    assert done["output"].count("Held-out loss") == 1


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *words: str) -> None:
    assert cli.main(arguments) == code
    text = capsys.readouterr().err
    assert all(word in text for word in words) and text.startswith("megashear: error: ") and text.count("\n") == 1, text


def test_a_dataset_of_another_tokenizer(
    unbroken_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "tokenizer.json", 390)
    make_dataset(tmp_path / "data", tmp_path / "tokenizer.json", TEXTS)
    ours = arguments(unbroken_folder, tmp_path / "data", tmp_path / "out.json")
    refused(capsys, ours, 3, "made with another tokenizer", "preprocess the data again")
    assert not (tmp_path / "out.json").exists()


def test_what_is_no_model(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys,
        arguments(tmp_path, tiny.data, tmp_path / "o"),
        4,
        f"{tmp_path}: neither a model folder",
        "megashear run",
    )


def test_a_damaged_model(unbroken_folder: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "final"
    folder.mkdir()
    for path in (unbroken_folder / "final").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    refused(
        capsys, arguments(folder, tiny.data, tmp_path / "o"), 4, "model.safetensors: its SHA-256 is not the manifest's"
    )


def test_a_layout_that_the_ranks_do_not_make(
    unbroken_folder: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, [*arguments(unbroken_folder, tiny.data, tmp_path / "o"), "--tensor", "2"], 2, "tensor 2")


def test_neither_data_nor_tasks(unbroken_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["eval", str(unbroken_folder)], 2, "give a dataset folder (DATA), or tasks (--tasks)")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_tasks_without_the_harness(unbroken_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["eval", str(unbroken_folder), "--tasks", "a"], 2, "pip install 'lm-eval[hf]'")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness")
def test_tasks(unbroken_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": "def open", "choices": ["(self", " zzz"], "gold": number % 2} for number in range(6)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "lines.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    (tmp_path / "tiny.yaml").write_text(task)
    ours = ["eval", str(unbroken_folder), "--include", str(tmp_path), "--json", str(tmp_path / "out.json")]
    refused(capsys, [*ours, "--tasks", "no_such_task"], 2, "knows no no_such_task")
    assert cli.main([*ours, "--tasks", "tiny_choice", "--limit", "4"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"]["tiny_choice"]["acc,none"] == 0.5
