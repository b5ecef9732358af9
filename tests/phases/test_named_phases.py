"""`run.phases` may change between starts: what a run folder has come to counts, whatever the run file names now."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.tiny import Tiny, finish
from megashear.errors import CheckpointError, ModelError
from megashear.hf.model_folder import ModelFolder
from megashear.report.run_record import read_run

ONE_SHOT = ["prune.method=one_shot", "prune.importance.criterion=magnitude", "prune.refit=0"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def finished(unbroken_folder: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(unbroken_folder, tmp_path / "run"))


def test_export_alone_takes_what_was_trained_and_the_summary_stays_whole(tiny: Tiny, finished: Path) -> None:
    before = read(finished / "summary.json")
    finish(tiny.config(finished, "run.phases=[export]"))
    exported, final = (load_file(finished / name / "model.safetensors") for name in ("export", "final"))
    assert all(exported[name].equal(value) for name, value in final.items())
    after = read(finished / "summary.json")
    assert Path(after["export"]).samefile(finished / "export")
    assert after | {"export": None} == before


def test_an_export_of_the_pruned_model_does_not_stand_for_the_trained_one(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(tiny.config(folder, *ONE_SHOT, "run.phases=[prune,finalize,export]"))
    with pytest.raises(ModelError, match="exists and is not this export; remove it"):
        finish(tiny.config(folder, *ONE_SHOT, "run.phases=[prune,finalize,pretrain,export]"))
    shutil.rmtree(folder / "export")
    finish(tiny.config(folder, *ONE_SHOT, "run.phases=[prune,finalize,pretrain,export]"))
    exported, final = (load_file(folder / name / "model.safetensors") for name in ("export", "final"))
    assert all(exported[name].equal(value) for name, value in final.items())


def test_pretraining_alone_trains_what_was_pruned_before(tiny: Tiny, tmp_path: Path) -> None:
    finish(tiny.config(tmp_path / "whole", *ONE_SHOT))
    finish(tiny.config(tmp_path / "parts", *ONE_SHOT, "run.phases=[prune,finalize]"))
    finish(tiny.config(tmp_path / "parts", *ONE_SHOT, "run.phases=[pretrain]"))
    whole, parts = (tmp_path / name / "final/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    phases = ModelFolder.open(tmp_path / "parts/final").provenance["phases"]
    assert [phase["name"] for phase in phases] == ["prune", "finalize", "pretrain"]
    summaries = [read(tmp_path / name / "summary.json") for name in ("whole", "parts")]
    for name in ("losses", "parameters", "tokens"):
        assert summaries[1][name] == summaries[0][name], name
    assert summaries[1]["seconds"].keys() == {"prune", "pretrain"}


def test_what_was_trained_without_pruning_is_not_taken_for_what_pruning_makes(tiny: Tiny, tmp_path: Path) -> None:
    finish(tiny.config(tmp_path / "run", "run.phases=[pretrain]"))
    with pytest.raises(CheckpointError, match=r"pre-training is done, of another model than prune would make now"):
        finish(tiny.config(tmp_path / "run"))
    for name in ("pretrain", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    finish(tiny.config(tmp_path / "run"))
    assert ModelFolder.open(tmp_path / "run/final").shape.hidden_size == 24


def test_the_record_of_a_run_knows_phases_that_are_no_longer_named(tiny: Tiny, finished: Path) -> None:
    named = read_run(finished)
    finish(tiny.config(finished, "run.phases=[pretrain]"))
    found = read_run(finished)
    assert found.config is not None and found.config.run.phases == ["prune", "finalize", "pretrain"]
    assert found.done.keys() == named.done.keys() and found.losses == named.losses and found.missing == []
    assert (found.source, found.target) == (named.source, named.target) and found.sequences.keys()
