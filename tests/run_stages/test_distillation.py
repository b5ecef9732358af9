"""Runs with the source as teacher, in pruning and in continued pre-training."""

from pathlib import Path
from typing import Any

import pytest

from megashear.config.training_schema import DistillationConfig
from megashear.errors import CheckpointError, ConfigError
from megashear.run.teacher import build_teacher
from run_stages.tiny import Tiny, break_off, differing, finish, records, results

TAUGHT = [
    *("prune.distillation.weight=0.5", "prune.distillation.temperature=2", "prune.distillation.chunk=23"),
    *("pretrain.distillation.weight=0.75", "prune.batch.steps=5", "pretrain.batch.steps=4"),
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


def test_without_weight_there_is_no_teacher_and_no_bit_differs(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    finish(tiny.config(tmp_path / "run", "prune.distillation.temperature=3", "pretrain.distillation.chunk=7"))
    assert differing(results(tmp_path / "run"), unbroken) == []
    assert not any("distillation" in one for one in records(tmp_path / "run"))


def test_a_run_from_scratch_has_no_teacher() -> None:
    class Scratch:
        source = None
        layout = None

    with pytest.raises(ConfigError, match="a run from scratch has no teacher"):
        build_teacher(Scratch(), DistillationConfig(weight=0.5))  # type: ignore[arg-type]
    assert build_teacher(Scratch(), DistillationConfig()) is None  # type: ignore[arg-type]
