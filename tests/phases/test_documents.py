"""`data.separate_documents`: losses are transformers' own on each document alone; a run goes its whole way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny import Tiny, break_off, differing, finish, results
from megashear import cli
from megashear.dataset.dataset_folder import Dataset
from megashear.mixture.loader import HeldOut

LENGTH, SEQUENCES = 64, 6


def alone(model: torch.nn.Module, tokens: torch.Tensor, separator: int) -> float:
    """Mean loss of a window [S + 1], each of its documents given to the model by itself, from position 0."""
    losses, start = [], 0
    ends = [i + 1 for i, token in enumerate(tokens[:-1].tolist()) if token == separator]
    for end in sorted({*ends, len(tokens) - 1}):
        with torch.no_grad():
            logits = model(tokens[None, start:end]).logits[0].double()
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[start + 1 : end + 1], reduction="none"))
        start = end
    return float(torch.cat(losses).mean())


def test_evaluation_inside_documents(tiny: Tiny, unbroken_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(unbroken_folder / "final", dtype=torch.float32).eval()
    dataset = Dataset.open(tiny.data)
    heldout = HeldOut(dataset, LENGTH, SEQUENCES)
    rows = [(domain, heldout.read([row])[0][0].long()) for row, (domain, _) in enumerate(heldout.rows)]
    assert sum(dataset.eos_id in tokens[:-2] for _, tokens in rows) > 2
    sizes = ["--sequence-length", str(LENGTH), "--sequences", str(SEQUENCES)]
    found = []
    for more in ([], ["--separate-documents"]):
        ours = ["eval", str(unbroken_folder), str(tiny.data), *sizes, *more, "--json", str(tmp_path / "out.json")]
        assert cli.main(ours) == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["losses"])
    for number, name in enumerate(dataset.domains):
        wanted = np.mean([alone(model, tokens, dataset.eos_id) for domain, tokens in rows if domain == number])
        assert found[1][name] == pytest.approx(wanted, rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_a_run_inside_documents(tiny: Tiny, unbroken_folder: Path, tmp_path: Path) -> None:
    """Both phases and the proof of finalisation; the same when stopped and resumed without reading ahead."""
    finish(tiny.config(tmp_path / "run", "data.separate_documents=true"))
    assert break_off(tiny.config(tmp_path / "resumed", "data.separate_documents=true"), ("prune", 5))
    finish(tiny.config(tmp_path / "resumed", "data.separate_documents=true", "data.prefetch=0"))
    assert differing(results(tmp_path / "resumed"), results(tmp_path / "run")) == []
    apart = json.loads((tmp_path / "run/pretrain/done.json").read_text())["losses"]
    assert apart != json.loads((unbroken_folder / "pretrain/done.json").read_text())["losses"]
