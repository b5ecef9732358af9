"""A run that was stopped or killed anywhere, and started again, has the bits and the records of the unbroken one."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import RUN, Killed, Tiny, break_off, die, differing, finish, records, results, without_pictures
from megashear.config.load import load_config
from megashear.errors import CheckpointError, Interrupted
from megashear.phases.run_folder import differences, identity
from megashear.phases.runner import run
from megashear.processes import StopRequest


def stopped_at_every_step(config: Any) -> int:
    """Finish a run that gets a signal in every single step; returns how often it was started."""
    starts = 1
    while break_off(config, None):
        starts += 1
    return starts


@pytest.mark.quick
def test_the_same_run_twice_gives_the_same_bits(tiny: Tiny, unbroken: dict[str, Any], tmp_path: Path) -> None:
    finish(tiny.config(tmp_path / "run"))
    assert differing(results(tmp_path / "run"), unbroken) == []
    assert {"final/model.safetensors", "prune step-00000008", "pretrain step-00000006"} <= unbroken.keys()


def test_stopped_by_a_signal_after_every_step(tiny: Tiny, unbroken: dict[str, Any], tmp_path: Path) -> None:
    assert stopped_at_every_step(tiny.config(tmp_path / "run")) == 14
    assert differing(results(tmp_path / "run"), unbroken) == []


@pytest.mark.parametrize(
    "where",
    [
        ("prune", 4),  # before the first checkpoint, which is due
        ("prune", 5),  # right after it
        ("prune", 8),  # at the end of the phase, before its checkpoint
        ("pretrain", 3),
    ],
)
def test_killed_and_started_again(tiny: Tiny, unbroken: dict[str, Any], tmp_path: Path, where: tuple[str, int]) -> None:
    config = tiny.config(tmp_path / "run")
    assert break_off(config, where, die)
    finish(config)
    assert differing(results(tmp_path / "run"), unbroken) == []


@pytest.mark.parametrize(
    "overrides",
    [["precision=bf16"], ["precision=bf16", "parallel.distributed_optimizer=false", "mixture.rule=reference"]],
)
def test_bf16_with_and_without_the_distributed_optimizer(tiny: Tiny, tmp_path: Path, overrides: list[str]) -> None:
    overrides = [*overrides, "prune.batch.steps=5", "pretrain.batch.steps=3"]
    finish(tiny.config(tmp_path / "unbroken", *overrides))
    config = tiny.config(tmp_path / "run", *overrides)
    assert break_off(config, ("prune", 3)) and break_off(config, ("pretrain", 2))
    finish(config)
    assert differing(results(tmp_path / "run"), results(tmp_path / "unbroken")) == []


def test_no_evaluation_stands_twice_when_killed_after_it(
    tiny: Tiny, unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last checkpoint of a phase and its record: the evaluation at that step is not repeated."""
    config = tiny.config(tmp_path / "run")
    monkeypatch.setattr("megashear.phases.training.write_model", lambda *_: die())
    for _ in range(2):
        with pytest.raises(Killed):
            finish(config)
    steps = [(one["kind"], one["step"]) for one in records(tmp_path / "run")]
    assert len(steps) == len(set(steps))
    monkeypatch.undo()
    finish(config)
    assert differing(results(tmp_path / "run"), unbroken) == []


def test_stopped_between_phases(tiny: Tiny, unbroken: dict[str, Any], tmp_path: Path) -> None:
    """A signal in the last step of a phase stops before the next one; nothing that is done is done again."""
    config = tiny.config(tmp_path / "run")
    assert break_off(config, ("prune", 8))
    assert (tmp_path / "run/prune/done.json").exists() and not (tmp_path / "run/pruned").exists()
    with without_pictures():
        run(config, ["prune", "finalize"])
    finalized = (tmp_path / "run/finalize/done.json").stat().st_mtime_ns
    assert not break_off(config, ("pretrain", 6)), "the last phase ends, there is nothing left to stop"
    assert (tmp_path / "run/finalize/done.json").stat().st_mtime_ns == finalized
    finish(config)
    assert differing(results(tmp_path / "run"), unbroken) == []


def test_a_stop_asked_for_before_the_start_computes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.received = 15
    with without_pictures(), pytest.raises(Interrupted, match="interrupted by a signal before prune"):
        run(tiny.config(tmp_path / "run"), stop=stop)
    assert not (tmp_path / "run/prune").exists()


def test_single_held_out_sequences_have_no_error_but_a_record(tiny: Tiny, tmp_path: Path) -> None:
    """The standard error of one sequence is not known; the run's records say null and can be read back."""
    finish(tiny.config(tmp_path / "run", "prune.batch.eval_sequences=1", "pretrain.batch.eval_sequences=1"))
    last = [one for one in records(tmp_path / "run") if one["kind"] == "eval"][-1]
    assert set(last["error"].values()) == {None}
    assert results(tmp_path / "run")["pretrain/done.json"]["errors"] == last["error"]


@pytest.mark.parametrize("name", ["source_losses.json", "prune/done.json", "identity.json"])
def test_records_that_are_damaged_or_gone(tiny: Tiny, tmp_path: Path, name: str) -> None:
    config = tiny.config(tmp_path / "run")
    assert break_off(config, ("pretrain", 3))
    path = tmp_path / "run" / name
    path.write_text("{")
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
        finish(config)
    if name == "source_losses.json":
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{path}: missing"):
            finish(config)


@pytest.mark.parametrize("version", [None, 2])
def test_a_run_folder_of_another_format_is_refused(tiny: Tiny, tmp_path: Path, version: int | None) -> None:
    config = tiny.config(tmp_path / "run")
    assert break_off(config, ("prune", 1))
    path = tmp_path / "run/identity.json"
    record = json.loads(path.read_text())
    assert record.pop("format_version") == 1
    path.write_text(json.dumps(record if version is None else record | {"format_version": version}))
    with pytest.raises(CheckpointError, match=f"{path}: format_version is {version or 'unknown'}, .* reads 1; finish"):
        finish(config)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_one_of_forty_steps_of_both_phases(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    sections = {
        phase: RUN[phase] | {"batch": RUN[phase]["batch"] | {"steps": 40, "eval_interval": 7}}
        for phase in ("prune", "pretrain")
    }
    for name in ("unbroken", "run"):
        tiny.file(tmp_path / name, precision=precision, checkpoint={"interval": 11}, **sections)
    finish(load_config(tmp_path / "unbroken.yaml"))
    assert stopped_at_every_step(load_config(tmp_path / "run.yaml")) == 80
    assert differing(results(tmp_path / "run"), results(tmp_path / "unbroken")) == []


@pytest.mark.parametrize(
    ("then", "now", "changed"),
    [
        (
            ["weight=0"],
            ["stop_when=end"],
            ["stop_when: unset -> end", "temperature: unset -> 1.0", "weight: 0.0 -> None"],
        ),
        (["weight=0.5"], ["weight=0.5", "stop_when=end"], ["stop_when: student_better -> end"]),
        (["weight=0"], ["weight=0", "stop_when=end", "temperature=3"], []),  # without a teacher they change nothing
    ],
    ids=["a teacher is added", "it stays longer", "no teacher"],
)
def test_keys_of_a_teacher_on_resume(
    tiny: Tiny, tmp_path: Path, then: list[str], now: list[str], changed: list[str]
) -> None:
    record, later = (
        identity(tiny.config(tmp_path / "run", *(f"prune.distillation.{key}" for key in keys))) for keys in (then, now)
    )
    assert differences(record, later, "") == [f"prune.distillation.{text}" for text in changed]
