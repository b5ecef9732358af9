"""Metrics: records survive kills and resumes unbroken, a logger that fails is switched off and training goes on."""

import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest

from megashear.errors import DataError, Interrupted
from megashear.train.metrics import JsonLines, Metrics, read_metrics


def train(phase: str, step: int, loss: float = 2.5) -> dict:
    return {
        "phase": phase,
        "step": step,
        "kind": "train",
        "loss": loss,
        "lr": 1e-4,
        "grad_norm": 0.9,
        "tokens": step * 4096,
        "tokens_per_second": 1844.0,
        "step_seconds": 0.56,
        "seconds": step * 2.2,
        "evaluation_seconds": step * 0.1,
        "domain_tokens": {"web": step * 3000, "code": step * 1096},
        "skipped": 0,
    }


def files_only(folder: Path) -> Metrics:
    return Metrics(folder, tensorboard=False, wandb_project=None, run_name="test")


def steps(folder: Path, phase: str) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["phase"] == phase]


def test_records_come_back_as_written(tmp_path: Path) -> None:
    records = [train("prune", 10), train("prune", 20, loss=1 / 3)]
    with files_only(tmp_path) as metrics:
        for record in records:
            metrics.write(record)
            assert read_metrics(tmp_path / "metrics.jsonl")[-1] == record, "a line is there once write returns"
    assert read_metrics(tmp_path / "metrics.jsonl") == records


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with files_only(tmp_path) as metrics:
        metrics.write(train("prune", 1, loss=math.nan))
        metrics.write(train("prune", 2, loss=math.inf))
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]


def test_resume_cuts_the_phase_after_the_checkpoint_and_no_other(tmp_path: Path) -> None:
    with files_only(tmp_path) as metrics:
        for phase in ("prune", "pretrain"):
            for step in (0, 10, 20, 30):
                metrics.write(train(phase, step))
    with files_only(tmp_path) as metrics:
        metrics.resume("pretrain", 20)
        metrics.write(train("pretrain", 30, loss=9.0))
    assert steps(tmp_path, "prune") == [0, 10, 20, 30]
    assert steps(tmp_path, "pretrain") == [0, 10, 20, 30]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 9.0


def test_a_phase_that_begins_anew_has_no_records(tmp_path: Path) -> None:
    with files_only(tmp_path) as metrics:
        metrics.write(train("prune", 0))
        metrics.write(train("prune", 10))
        metrics.resume("prune", 0)
        assert read_metrics(tmp_path / "metrics.jsonl") == []
        metrics.write(train("prune", 0))
    assert steps(tmp_path, "prune") == [0]


def test_a_torn_last_line_is_left_out_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with files_only(tmp_path) as metrics:
        metrics.write(train("prune", 10))
    with open(path, "ab") as file:
        file.write(b'{"phase": "prune", "step": 2')
    assert [r["step"] for r in read_metrics(path)] == [10]
    with files_only(tmp_path) as metrics:
        metrics.write(train("prune", 20))
    assert [r["step"] for r in read_metrics(path)] == [10, 20]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)
    with pytest.raises(DataError, match="give a run that has trained"):
        read_metrics(tmp_path / "absent.jsonl")


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run", True, "project", "test", enabled=False) as metrics:
        metrics.resume("prune", 0)
        metrics.write(train("prune", 1))
        metrics.write_masks({"hidden": np.ones(4)})
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_warns_once_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = files_only(tmp_path)
    metrics.write(train("prune", 1))
    sink = metrics._sinks[0]
    assert isinstance(sink, JsonLines)
    sink._file.close()
    sink._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (the kernel itself says ENOSPC)
    with caplog.at_level(logging.WARNING):
        metrics.write(train("prune", 2))
        metrics.write(train("prune", 3))
    metrics.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/metrics.jsonl: cannot be written (No space left on device); switched off, training continues"
    ]
    assert steps(tmp_path, "prune") == [1]


def test_a_write_cut_short_leaves_whole_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NearlyFull:
        """A disk with room for 10 more bytes."""

        def __init__(self, file):
            self.write = lambda line: file.write(line[:10])
            self.truncate, self.close = file.truncate, file.close

    metrics = files_only(tmp_path)
    metrics.write(train("prune", 1))
    metrics._sinks[0]._file = NearlyFull(metrics._sinks[0]._file)
    metrics.write(train("prune", 2))
    metrics.close()
    assert "No space left on device" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1
    assert steps(tmp_path, "prune") == [1]


def test_a_folder_that_cannot_be_written_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file stands where the folder should be")
    with files_only(tmp_path / "run") as metrics:
        metrics.write(train("prune", 1))
        metrics.write_masks({"hidden": np.ones(4)})
        metrics.write_masks({"hidden": np.ones(4)})
    assert caplog.text.count("switched off") == 2, "once for the records, once for the masks"


def test_a_failing_tensorboard_leaves_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file stands where the folder should be")
    with Metrics(tmp_path, tensorboard=True, wandb_project=None, run_name="test") as metrics:
        metrics.write(train("prune", 1))
        metrics.write(train("prune", 2))
    assert caplog.text.count("TensorBoard: cannot be written") == 1
    assert steps(tmp_path, "prune") == [1, 2]


def test_a_stop_signal_is_not_taken_for_a_failure(tmp_path: Path) -> None:
    def stop(record):
        raise Interrupted("stopped")

    metrics = files_only(tmp_path)
    metrics._sinks[0].write = stop
    with pytest.raises(Interrupted):
        metrics.write(train("prune", 1))
    metrics.close()


def test_tensorboard_holds_every_number_and_forgets_on_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, tensorboard=True, wandb_project=None, run_name="test") as metrics:
        for step in (10, 20, 30):
            metrics.write(train("prune", step))
    with Metrics(tmp_path, tensorboard=True, wandb_project=None, run_name="test") as metrics:
        metrics.resume("prune", 20)
        metrics.write(train("prune", 30, loss=1.0))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "prune"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/domain_tokens/code"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 2.5), (30, 1.0)]


def test_wandb_that_is_not_there_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # makes `import wandb` fail
    with Metrics(tmp_path, tensorboard=False, wandb_project="project", run_name="test") as metrics:
        metrics.write(train("prune", 1))
    assert caplog.text.count("Weights & Biases: cannot be written") == 1
    assert steps(tmp_path, "prune") == [1]


def test_wandb_offline_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    identities = []
    for step in (10, 20):
        with Metrics(tmp_path, tensorboard=False, wandb_project="project", run_name="test") as metrics:
            assert len(metrics._sinks) == 2
            metrics.write(train("prune", step))
        identities.append((tmp_path / "wandb_id").read_text())
    assert identities[0] == identities[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identities[0]}"))) >= 1


def test_masks_are_replaced_whole(tmp_path: Path) -> None:
    with files_only(tmp_path) as metrics:
        metrics.write_masks({"hidden": np.ones(8), "layer": np.ones(2)})
        metrics.write_masks({"hidden": np.zeros(8), "head": np.ones((2, 4), dtype=np.float64)})
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as masks:
        assert sorted(masks) == ["head", "hidden"]
        assert masks["hidden"].sum() == 0 and masks["head"].shape == (2, 4) and masks["head"].dtype == np.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks.npz", "metrics.jsonl"]
