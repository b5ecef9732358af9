"""Dynamic batch loading within a run: weights follow the recorded losses, the data follow the weights."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.inputs import TEXTS, make_dataset
from helpers.tiny import Tiny, break_off, finish, records
from megashear import cli
from megashear.config.load import load_config
from megashear.dataset.dataset_folder import Dataset
from megashear.mixture.blend import BatchPlan
from megashear.mixture.loader import Loader
from megashear.mixture.update_rules import update_weights


def evaluations(folder: Path, phase: str) -> list[dict]:
    """Evaluation records of a phase, in order."""
    return [one for one in records(folder) if (one["kind"], one["phase"]) == ("eval", phase)]


def values(of: dict[str, float]) -> np.ndarray:
    return np.array(list(of.values()), dtype=np.float64)


@pytest.mark.parametrize("phase", ["prune", "pretrain"])
def test_weights_are_those_of_the_rule_and_the_recorded_losses(unbroken_folder: Path, phase: str) -> None:
    mixture = load_config(unbroken_folder / "config.yaml").mixture
    found = evaluations(unbroken_folder, phase)
    assert [one["step"] for one in found] == {"prune": [0, 3, 6, 8], "pretrain": [0, 2, 4, 6]}[phase]
    assert found[0]["reference"] == {"library": 6.2, "command": 6.0, "help": 5.0}
    if phase == "pretrain":  # goes on from the weights at the end of pruning, and updates before its first step
        before = evaluations(unbroken_folder, "prune")[-1]["weights"]
        found = [{"weights": before, "step": -1}, *found]
    assert len({tuple(one["weights"].values()) for one in found}) == {"prune": 3, "pretrain": 4}[phase], (
        "they do change"
    )
    for last, now in pairwise(found):
        expected = values(last["weights"])
        if now is not found[-1]:
            loss, reference = values(now["loss"]), values(now["reference"])
            expected = update_weights("paper", expected, loss, reference, mixture)
        np.testing.assert_array_equal(values(now["weights"]), expected)


def test_the_data_follow_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Between two evaluations each domain's sequences are its weight's share of all, within one at each end.

    Here with the source model's losses as references and the published code's rule, under which weights fall as well.
    """
    references = [
        "mixture.references=source",
        "mixture.reference_losses=null",
        "mixture.rule=reference",
        "mixture.eta=60",
    ]
    finish(tiny.config(tmp_path / "run", "run.phases=[prune]", "prune.batch.steps=12", *references))
    found = records(tmp_path / "run")
    known = json.loads((tmp_path / "run/source_losses.json").read_text())
    assert evaluations(tmp_path / "run", "prune")[0]["reference"] == {name: loss for name, (loss, _) in known.items()}
    taken = {one["step"]: values(one["domain_tokens"]) / 32 for one in found if one["kind"] == "train"}
    taken[0] = np.zeros(3)
    ends = evaluations(tmp_path / "run", "prune")
    for start, end in pairwise(ends):
        sequences = 8 * (end["step"] - start["step"])
        share = taken[end["step"]] - taken[start["step"]]
        assert share.sum() == sequences
        assert np.abs(share - values(start["weights"]) * sequences).max() <= 2
    assert np.abs(values(ends[-1]["weights"]) - values(ends[0]["weights"])).max() > 0.2, "the weights moved far"


def test_the_source_is_evaluated_on_the_windows_of_each_phase(tiny: Tiny, tmp_path: Path) -> None:
    """Where pruning takes others: pre-training's references are those of a run that takes pre-training's alone."""
    keys = ["mixture.references=source", "mixture.reference_losses=null", "mixture.rule=reference"]
    pretrain = {"seed": 3, "phases": ["pretrain"]}
    finish(tiny.config(tmp_path / "alone", *keys, "pretrain.batch.steps=1", "target=null", run=pretrain))
    config = tiny.config(tmp_path / "run", *keys, "prune.batch.eval_sequences=2")
    assert break_off(config, ("prune", 3))
    finish(config)
    known = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/source_losses*.json"))]
    assert len(known) == 3 and known[0] == known[2] != known[1]
    for phase, own in (("prune", known[1]), ("pretrain", known[2])):
        losses = {name: loss for name, (loss, _) in own.items()}
        assert all(one["reference"] == losses for one in evaluations(tmp_path / "run", phase))


def test_static_weights_stay(tiny: Tiny, tmp_path: Path) -> None:
    weights = "{library: 0.5, command: 0.25, help: 0.25}"
    overrides = [
        "run.phases=[prune]",
        "mixture.rule=static",
        "mixture.reference_losses=null",
        f"mixture.initial_weights={weights}",
    ]
    finish(tiny.config(tmp_path / "run", *overrides))
    found = evaluations(tmp_path / "run", "prune")
    assert [one["weights"] for one in found] == [{"library": 0.5, "command": 0.25, "help": 0.25}] * 4
    assert {one["reference"] for one in found} == {None}
    last = [one for one in records(tmp_path / "run") if one["kind"] == "train"][-1]
    assert last["domain_tokens"] == {"library": 1024, "command": 512, "help": 512}


def test_no_sample_comes_twice_in_a_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-training goes on where pruning left the stream, also when it is broken off in its midst; epochs add up."""
    taken: list[tuple[int, int]] = []
    read = Loader.read

    def noted(self: Loader, plan: BatchPlan, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        taken.extend(zip(plan.domain_B.tolist(), plan.sample_B.tolist(), strict=True))
        return read(self, plan, rows)

    monkeypatch.setattr(Loader, "read", noted)
    config = tiny.config(tmp_path / "run", "data.prefetch=0", "prune.importance.criterion=null")
    assert break_off(config, ("pretrain", 4))
    finish(config)
    assert len(taken) == 8 * (8 + 6) and len(set(taken)) == len(taken)
    last = [one for one in records(tmp_path / "run") if one["kind"] == "train"][-1]
    assert last["step"] == 6 and sum(last["domain_tokens"].values()) == 8 * 6 * 32
    dataset = Dataset.open(tiny.data)
    for index, name in enumerate(dataset.domains):
        there = sum(domain == index for domain, _ in taken) / (len(dataset.stream(name)) // 32)
        assert last["domain_epochs"][name] == pytest.approx(there, rel=0.05)


def test_a_domain_that_runs_out_is_told_and_shared(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One epoch of the smallest domain, then the others share its weight; interrupted and resumed it is the same."""
    chosen = [
        "data.exhausted=renormalise",
        "mixture.rule=static",
        "mixture.reference_losses=null",
        "run.phases=[prune]",
    ]
    chosen += ["prune.batch.steps=24", "mixture.initial_weights={library: 0.1, command: 0.1, help: 0.8}"]
    make_dataset(tmp_path / "data", tiny.source / "tokenizer.json", TEXTS | {"help": TEXTS["help"][:9000]})
    chosen.append(f"data.folder={tmp_path / 'data'}")
    finish(tiny.config(tmp_path / "run", *chosen))
    trained = [one for one in records(tmp_path / "run") if one["kind"] == "train"]
    assert trained[-1]["domain_epochs"]["help"] == 1.0 and trained[3]["domain_epochs"]["help"] < 1.0
    assert sum("domain 'help' ran out" in record.message for record in caplog.records) == 1
    assert break_off(tiny.config(tmp_path / "again", *chosen), ("prune", 20))
    finish(tiny.config(tmp_path / "again", *chosen))
    assert records(tmp_path / "again") == records(tmp_path / "run")
    weights = [(tmp_path / name / "masked/model.safetensors").read_bytes() for name in ("again", "run")]
    assert weights[0] == weights[1]


def test_a_run_warns_at_its_start_of_many_epochs(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tiny.file(tmp_path / "run")
    chosen = ["run.phases=[prune]", "prune.batch.steps=2", "data.max_epochs=0", "prune.batch.eval_interval=2"]
    assert cli.main(["run", str(run_file), *chosen]) == 0
    assert "warning: data: domain help would be read 0.0 times" in capsys.readouterr().out
