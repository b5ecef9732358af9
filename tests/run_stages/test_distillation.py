"""Runs with the source as teacher, in pruning and in continued pre-training."""

import json
import re
from math import inf, nan
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

from megashear.config.teaching import Teaching
from megashear.config.training_schema import BatchConfig
from megashear.errors import CheckpointError, ConfigError
from megashear.run import summary
from megashear.run.runner import run
from megashear.run.teacher import build_teacher
from megashear.train.loop import Counters, dismiss_teacher
from run_stages.tiny import Tiny, break_off, differing, finish, records, results, run_jobs

TAUGHT = [
    *("prune.distillation.weight=0.5", "prune.distillation.temperature=2", "prune.distillation.chunk=23"),
    *("pretrain.distillation.weight=0.75", "prune.batch.steps=5", "pretrain.batch.steps=4"),
    *("prune.distillation.until=end", "pretrain.distillation.until=end"),
]
OUTGROWN = [
    *("prune.distillation.weight=0.5", "prune.batch.steps=5", "pretrain.batch.steps=9"),
    "pretrain.optimizer.learning_rate=3e-3",
]


@pytest.fixture(scope="module")
def taught(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with a teacher, never stopped."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    finish(tiny.config(folder, *TAUGHT))
    return folder


def test_a_taught_run_resumes_with_the_same_bits(tiny: Tiny, tmp_path: Path, taught: Path) -> None:
    """Under the teacher that it began with; the chunk of a stage that is done may change, as a layout may."""
    config = tiny.config(tmp_path / "run", *TAUGHT)
    assert break_off(config, ("prune", 3)) and break_off(config, ("pretrain", 2))
    with pytest.raises(CheckpointError, match=r"pretrain\.distillation\.weight: 0\.75 -> 0\.5"):
        finish(tiny.config(tmp_path / "run", *TAUGHT, "pretrain.distillation.weight=0.5"))
    finish(tiny.config(tmp_path / "run", *TAUGHT, "prune.distillation.chunk=99"))
    assert differing(results(tmp_path / "run"), results(taught)) == []


def test_records_tell_the_divergence_and_what_it_costs(taught: Path) -> None:
    train = [one for one in records(taught) if one["kind"] == "train"]
    assert [one["stage"] for one in train] == ["prune"] * 5 + ["pretrain"] * 4
    assert all(0 < one["distillation"] < one["loss"] for one in train)
    assert {one["teacher_flops"] for one in train[:5]} == {1 / 3}, "the source teaches itself"
    assert 1 < train[5]["teacher_flops"] < 1.2, "a third of the source's, which is three times the target"
    assert [one["taught"] for one in train] == [1, 2, 3, 4, 5, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that has learned a little, so that what is made of it has something to make good."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    stage = ["pretrain.batch.steps=8", "pretrain.optimizer.learning_rate=1e-2", "target=null"]
    finish(tiny.config(folder, *stage, run={"seed": 3, "stages": ["pretrain"]}))
    return folder / "final"


def test_a_teacher_goes_when_its_student_is_no_worse(
    tiny: Tiny, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the held-out losses, in the middle of a stage; killed before and after, the run has the same bits."""
    source = {"folder": str(trained)}
    with patch.object(summary, "plot_run", lambda _: []):
        run(tiny.config(tmp_path / "whole", *OUTGROWN, source=source))
    found = records(tmp_path / "whole")
    before = json.loads((tmp_path / "whole/source_losses.json").read_text())
    limit = fmean(loss for loss, _ in before.values())
    losses = {one["step"]: fmean(one["loss"].values()) for one in found if one["kind"] == "eval"}
    train = [one for one in found if one["stage"] == "pretrain" and one["kind"] == "train"]
    last = train[-1]["taught"]
    assert 0 < last < 9 and losses[last] <= limit < losses[last - 2]
    assert [one["taught"] for one in train] == [min(step, last) for step in range(1, 10)]
    assert ["distillation" in one for one in train] == [step <= last for step in range(1, 10)]
    assert all(one["taught"] == one["step"] for one in found if one["stage"] == "prune" and one["kind"] == "train")
    said = re.findall(
        r"pretrain: after step (\d) the model's held-out loss of (\S+) .*: the teacher goes", capfd.readouterr().out
    )
    assert said == [(str(last), f"{losses[last]:.4f}")]

    config = tiny.config(tmp_path / "broken", *OUTGROWN, "checkpoint.interval=1", source=source)
    assert break_off(config, ("pretrain", last - 1)) and break_off(config, ("pretrain", last + 1))
    with patch("megashear.run.training.build_teacher", wraps=build_teacher) as built:
        finish(tiny.config(tmp_path / "broken", *OUTGROWN, source=source))
    assert [call.args[1].weight for call in built.call_args_list] == [0.0], "its weights are read once more for nothing"
    assert differing(results(tmp_path / "broken"), results(tmp_path / "whole")) == []


def test_it_goes_by_the_windows_of_its_stage(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    """Where pruning evaluates on others: the source's losses are those of a run that takes pre-training's alone."""
    source, pretrain = {"folder": str(trained)}, {"seed": 3, "stages": ["pretrain"]}
    finish(tiny.config(tmp_path / "alone", "pretrain.batch.steps=1", "target=null", source=source, run=pretrain))
    keys = [*OUTGROWN, "prune.batch.eval_sequences=2"]
    config = tiny.config(tmp_path / "run", *keys, source=source)
    assert break_off(config, ("prune", 3))
    finish(config)
    known = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/source_losses*.json"))]
    assert len(known) == 3 and known[0] == known[2] != known[1]
    limit = fmean(loss for loss, _ in known[0].values())
    found = [one for one in records(tmp_path / "run") if one["stage"] == "pretrain"]
    losses = {one["step"]: fmean(one["loss"].values()) for one in found if one["kind"] == "eval"}
    last = [one for one in found if one["kind"] == "train"][-1]["taught"]
    assert last == min(step for step, loss in losses.items() if loss <= limit) < 9


def test_a_loss_that_is_not_finite_sends_nobody_away(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does one after the last step; a finite one that is not above the source's does."""
    for loss, limit, step, goes in [
        (nan, 2.0, 3, 0),
        (2.0, nan, 3, 0),
        (inf, 2.0, 3, 0),
        (2.0, 2.0, 9, 0),
        (2.0, 2.0, 3, 1),
    ]:
        stage = MagicMock(source_loss=limit, counters=Counters(step=step), batch=BatchConfig(steps=9))
        stage.stepper.teacher.how, stage.stepper.masks, stage.name = Teaching(weight=0.5), None, "pretrain"
        dismiss_teacher(stage, loss)
        assert stage.go_untaught.call_count == goes
        assert ("the teacher goes" in capsys.readouterr().out) == bool(goes)


def test_under_pipelines_it_goes_at_the_same_step(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    """On every rank, whichever holds the losses; stopped after it went, the run goes on without it."""
    source = {"folder": str(trained)}
    jobs = [
        {
            "file": str(tiny.file(tmp_path / name, source=source)),
            "overrides": [*OUTGROWN, "parallel.pipeline=2", "checkpoint.interval=1"],
            "stop": stop,
            "finish": True,
        }
        for name, stop in (("whole", []), ("broken", [["pretrain", 8]]))
    ]
    run_jobs(2, tmp_path, jobs)
    assert differing(results(tmp_path / "broken"), results(tmp_path / "whole")) == []
    finish(tiny.config(tmp_path / "alone", *OUTGROWN, source=source))
    steps = [
        [one["taught"] for one in records(tmp_path / name) if one["kind"] == "train"] for name in ("whole", "alone")
    ]
    assert steps[0] == steps[1] and 0 < steps[0][-1] < 9


def test_without_weight_there_is_no_teacher_and_no_bit_differs(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    """Nor with an open one where the teacher would cost more than the model that is made."""
    finish(tiny.config(tmp_path / "run", "prune.distillation.temperature=3", "pretrain.distillation.chunk=7"))
    assert differing(results(tmp_path / "run"), unbroken) == []
    assert not any("distillation" in one for one in records(tmp_path / "run"))


def test_a_run_from_scratch_has_no_teacher() -> None:
    class Scratch:
        source = None
        layout = None

    with pytest.raises(ConfigError, match="a run from scratch has no teacher"):
        build_teacher(Scratch(), Teaching(weight=0.5))  # type: ignore[arg-type]
    assert build_teacher(Scratch(), Teaching()) is None  # type: ignore[arg-type]
