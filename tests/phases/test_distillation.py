"""Runs with the source as teacher, in pruning and in continued pre-training."""

import json
import re
import shutil
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

from helpers.ranks import LiveRanks
from helpers.tiny import RUN, Tiny, break_off, differing, finish, records, results
from megashear.config.resolve import DistillationPlan, training_tokens_of
from megashear.config.training_schema import BatchConfig
from megashear.errors import CheckpointError, ConfigError
from megashear.files.file_digests import NAME
from megashear.phases import summary
from megashear.phases.runner import run
from megashear.phases.training import build_teacher
from megashear.train.callbacks import DistillationStop
from megashear.train.step import StepResult
from megashear.train.training_phase import Counters

TAUGHT = [
    *("prune.distillation.weight=0.5", "prune.distillation.temperature=2", "prune.distillation.chunk=23"),
    *("pretrain.distillation.weight=0.75", "prune.batch.steps=5", "pretrain.batch.steps=4"),
    *("prune.distillation.stop_when=end", "pretrain.distillation.stop_when=end"),
]
PHASES = ("prune", "pretrain")
MADE, WHOLE = ["prune", "finalize"], ["prune", "finalize", "pretrain"]
OUTGROWN = [
    *("prune.distillation.weight=0.5", "prune.batch.steps=5", "pretrain.batch.steps=20"),
    "pretrain.optimizer.learning_rate=3e-3",
]


@pytest.fixture(scope="module")
def taught(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with a teacher, never stopped."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    finish(tiny.config(folder, *TAUGHT))
    return folder


def test_a_taught_run_resumes_with_the_same_bits(tiny: Tiny, tmp_path: Path, taught: Path) -> None:
    """Under the teacher that it began with; the chunk of a phase that is done may change, as a layout may."""
    config = tiny.config(tmp_path / "run", *TAUGHT)
    assert break_off(config, ("prune", 3)) and break_off(config, ("pretrain", 2))
    with pytest.raises(CheckpointError, match=r"pretrain\.distillation\.weight: 0\.75 -> 0\.5"):
        finish(tiny.config(tmp_path / "run", *TAUGHT, "pretrain.distillation.weight=0.5"))
    finish(tiny.config(tmp_path / "run", *TAUGHT, "prune.distillation.chunk=99"))
    assert differing(results(tmp_path / "run"), results(taught)) == []


def test_records_tell_the_divergence_and_what_it_costs(taught: Path) -> None:
    train = [one for one in records(taught) if one["kind"] == "train"]
    assert [one["phase"] for one in train] == ["prune"] * 5 + ["pretrain"] * 4
    assert all(0 < one["distillation"] < one["loss"] for one in train)
    assert train[0]["teacher_loss"] == pytest.approx(train[0]["loss"], abs=0.02), "masks are hardly closed"
    known = json.loads((taught / "source_losses.json").read_text())
    untrained = fmean(loss for loss, _ in known.values())
    assert fmean(one["teacher_loss"] for one in train) == pytest.approx(untrained, abs=0.1), "it does not learn"
    assert {one["teacher_flops"] for one in train[:5]} == {1 / 3}, "the source teaches itself"
    assert 1 < train[5]["teacher_flops"] < 1.2, "a third of the source's, which is three times the target"
    assert [one["distilled_steps"] for one in train] == [1, 2, 3, 4, 5, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that has learned a little, so that what is made of it has something to make good."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    phase = ["pretrain.batch.steps=8", "pretrain.optimizer.learning_rate=1e-2", "target=null"]
    finish(tiny.config(folder, *phase, run={"seed": 3, "phases": ["pretrain"]}))
    return folder / "final"


@pytest.mark.parametrize(("first", "then", "teaches"), [(MADE, WHOLE, True), (WHOLE, MADE, False)])
def test_a_run_settles_at_its_first_start_whether_it_is_taught(
    tiny: Tiny, trained: Path, tmp_path: Path, first: list[str], then: list[str], teaches: bool
) -> None:
    """Its source has seen more text than pruning takes and less than all phases do, which may be named later on."""
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    manifest = json.loads((source / NAME).read_text())
    del manifest["provenance"]["source"]  # as of a model that was trained from random weights
    (source / NAME).write_text(json.dumps(manifest))
    assert 4 * 256 < training_tokens_of(source) == 8 * 256 < 10 * 256
    run_file = {
        "source": {"folder": str(source)},
        "target": RUN["target"] | {"num_layers": 4, "num_heads": 4, "num_query_groups": 2},
    }
    keys = ["prune.batch.steps=4", "pretrain.batch.steps=6"]
    starts = [
        tiny.config(tmp_path / "run", *keys, run={"seed": 3, "phases": named}, **run_file) for named in (first, then)
    ]
    assert break_off(starts[0], ("prune", 2))
    finish(starts[1])
    train = [one for one in records(tmp_path / "run") if one["kind"] == "train"]
    assert len(train) == (10 if then == WHOLE else 4)
    assert {"teacher_loss" in one for one in train} == {teaches}


def left(found: list[dict[str, Any]], phase: str) -> int:
    """Step after which a phase's teacher has to go by its records, of every step: the first eight in a row in whose
    mean the loss is not above the teacher's; in pruning from half of every target sparsity on.
    """
    train = [one for one in found if one["phase"] == phase and one["kind"] == "train"]
    behind = [one["loss"] - one["teacher_loss"] for one in train if "teacher_loss" in one]
    masks = [one for one in found if one["phase"] == phase and one["kind"] == "mask"]
    for step in range(8, len(behind) + 1):
        mask = masks[step - 1] if masks else {"expected": {}}
        half = {name: share / 2 for name, share in masks[-1]["target"].items()} if masks else {}
        if fmean(behind[step - 8 : step]) <= 0 and all(mask["expected"][name] >= half[name] for name in half):
            return step
    return len(train)


@pytest.mark.expensive("a whole run, and one interrupted twice, each with a teacher")
def test_a_teacher_goes_when_its_student_is_no_worse(
    tiny: Tiny, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By both losses of the text that is learned from, in the middle of a phase; killed before and after, the run has
    the same bits.
    """
    source = {"folder": str(trained)}
    with patch.object(summary, "draw_pictures", lambda _: []):
        run(tiny.config(tmp_path / "whole", *OUTGROWN, source=source))
    found = records(tmp_path / "whole")
    train = [one for one in found if one["phase"] == "pretrain" and one["kind"] == "train"]
    last = left(found, "pretrain")
    assert 8 < last < 19
    assert [one["distilled_steps"] for one in train] == [min(step, last) for step in range(1, 21)]
    for key in ("distillation", "teacher_loss"):
        assert [key in one for one in train] == [step <= last for step in range(1, 21)]
    assert all(
        one["distilled_steps"] == one["step"] for one in found if one["phase"] == "prune" and one["kind"] == "train"
    )
    below = fmean(one["teacher_loss"] - one["loss"] for one in train[last - 8 : last])
    said = re.findall(r"pretrain: step (\d+): student overtook .*\(loss (\S+) lower", capfd.readouterr().out)
    assert said == [(str(last), f"{below:.4f}")]

    config = tiny.config(tmp_path / "broken", *OUTGROWN, "checkpoint.interval=1", source=source)
    assert break_off(config, ("pretrain", last - 1)) and break_off(config, ("pretrain", last + 1))
    with patch("megashear.phases.training.build_teacher", wraps=build_teacher) as built:
        finish(tiny.config(tmp_path / "broken", *OUTGROWN, source=source))
    assert [call.args[1].weight for call in built.call_args_list] == [0.0], "its weights are read once more for nothing"
    assert differing(results(tmp_path / "broken"), results(tmp_path / "whole")) == []


def test_in_pruning_it_stays_until_masks_have_half_of_their_targets(tiny: Tiny, tmp_path: Path) -> None:
    """Though its student, the same model with masks that are open, is soon better; pre-training asks again."""
    keys = ["prune.distillation.weight=0.5", "prune.optimizer.learning_rate=1e-2", "prune.optimizer.warmup_steps=0"]
    finish(tiny.config(tmp_path / "run", *keys, "prune.batch.steps=40", "pretrain.batch.steps=10"))
    found = records(tmp_path / "run")
    train = {phase: [one for one in found if one["phase"] == phase and one["kind"] == "train"] for phase in PHASES}
    behind = [one["loss"] - one["teacher_loss"] for one in train["prune"] if "teacher_loss" in one]
    assert fmean(behind[:8]) < 0, "it is not the masks that it waits for"
    assert 8 < train["prune"][-1]["distilled_steps"] == left(found, "prune") < 40
    assert train["pretrain"][-1]["distilled_steps"] == left(found, "pretrain") == 8


def test_what_sends_nobody_away(capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer steps than are asked, a skipped step, the last step; otherwise a loss that is not above the teacher's."""
    for behind, step, skipped, until, goes in [
        ([0.0] * 6, 7, False, "student_better", 0),
        ([0.0] * 7, 9, False, "student_better", 0),
        ([0.0] * 7, 8, True, "student_better", 0),
        ([0.0] * 7, 8, False, "end", 0),
        ([0.1, *[0.0] * 6], 8, False, "student_better", 0),
        ([9.0, *[0.0] * 7], 8, False, "student_better", 1),
    ]:
        phase = MagicMock(counters=Counters(step=step, loss_gaps=behind), batch=BatchConfig(steps=9))
        phase.stepper.teacher.how, phase.stepper.masks, phase.name = (
            DistillationPlan(weight=0.5, stop_when=until),
            None,
            "pretrain",
        )
        loss = nan if skipped else 2.0
        phase.is_finished = step == 9
        DistillationStop().after_step(phase, StepResult(loss, 0.1, 2.0, 1.0, skipped, None, None, None, 1.0))
        assert phase.stop_distillation.call_count == goes
        assert ("distillation stopped" in capsys.readouterr().out) == bool(goes)


@pytest.mark.expensive("25 steps on two ranks, twice")
def test_under_pipelines_it_goes_at_the_same_step(ranks: LiveRanks, tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    """On every rank, whichever holds the losses; stopped after it went, the run goes on without it."""
    source = {"folder": str(trained)}
    jobs = [
        {
            "file": str(tiny.file(tmp_path / name, source=source)),
            "overrides": [*OUTGROWN, "parallel.pipeline=2", "checkpoint.interval=100"],
            "stop": stop,
            "finish": True,
        }
        for name, stop in (("whole", []), ("broken", [["pretrain", 18]]))
    ]
    ranks(2).call("helpers.jobs:run_all", jobs=jobs)
    assert differing(results(tmp_path / "broken"), results(tmp_path / "whole")) == []
    finish(tiny.config(tmp_path / "alone", *OUTGROWN, source=source))
    steps = [
        [one["distilled_steps"] for one in records(tmp_path / name) if one["kind"] == "train"]
        for name in ("whole", "alone")
    ]
    assert steps[0] == steps[1] and 8 < steps[0][-1] < 18


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
        build_teacher(Scratch(), DistillationPlan(weight=0.5))  # type: ignore[arg-type]
    assert build_teacher(Scratch(), DistillationPlan()) is None  # type: ignore[arg-type]
