"""Adam's moments go from pruning into pre-training: the two phases together are one long phase with settled masks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny import Killed, Tiny, break_off, die, finish, records
from megashear.engine.optimizer import MOMENTS
from megashear.hf.model_folder import ModelFolder
from megashear.phases import moments, training

STEADY = {"learning_rate": 1e-3, "warmup_steps": 0, "min_ratio": 1.0}
SETTLING = {
    "basis": "source",  # elsewhere the cut folds gains into norms, which then train by other steps
    "constraint": "projected",
    "clip": "weights",
    "importance": {"batches": 2},
    "mask_learning_rate": 0.1,
    "sparsity_warmup_steps": 4,
    "optimizer": STEADY,
}


def phase(steps: int) -> dict:
    return {"steps": steps, "global_batch": 8, "micro_batch": 2, "eval_interval": 100, "eval_sequences": 2}


def run(tiny: Tiny, folder: Path, prune_steps: int, phases: list[str], kept: str = "pruned", *overrides: str) -> list:
    """Losses of every training step; masks settle after step 5 whatever the number of steps."""
    prune = SETTLING | {"batch": phase(prune_steps), "freeze_steps": prune_steps - 5}
    pretrain = {"batch": phase(6), "optimizer": STEADY, "moments": kept}
    weights = {"library": 0.5, "command": 0.25, "help": 0.25}
    sections = {
        "run": {"seed": 3, "phases": phases},
        "mixture": {"rule": "static", "initial_weights": weights},
        "prune": prune,
        "pretrain": pretrain,
    }
    finish(tiny.config(folder, *overrides, **sections))
    return [one["loss"] for one in records(folder) if one["kind"] == "train"]


def test_pruning_and_pre_training_are_one_long_phase(tiny: Tiny, tmp_path: Path) -> None:
    long = run(tiny, tmp_path / "long", 14, ["prune"])
    parts = run(tiny, tmp_path / "parts", 8, ["prune", "finalize", "pretrain"])
    fresh = run(tiny, tmp_path / "fresh", 8, ["prune", "finalize", "pretrain"], "fresh")
    np.testing.assert_allclose(parts, long, rtol=2e-6)
    np.testing.assert_array_equal(fresh[:9], parts[:9])
    assert np.abs(np.array(fresh[9:]) - parts[9:]).max() > 1e-3
    assert not (tmp_path / "parts" / moments.FOLDER).exists(), "they go when pre-training is done"


def test_moments_wait_for_a_pre_training_that_is_broken_off(tiny: Tiny, tmp_path: Path) -> None:
    whole = run(tiny, tmp_path / "whole", 8, ["prune", "finalize", "pretrain"])
    file = tiny.config(
        tmp_path / "broken",
        run={"seed": 3, "phases": ["prune", "finalize", "pretrain"]},
        mixture={"rule": "static", "initial_weights": {"library": 0.5, "command": 0.25, "help": 0.25}},
        prune=SETTLING | {"batch": phase(8), "freeze_steps": 3},
        pretrain={"batch": phase(6), "optimizer": STEADY},
    )
    assert break_off(file, ("pretrain", 2))
    for name in MOMENTS:
        cut = ModelFolder.open(tmp_path / "broken" / moments.FOLDER / f"pruned-{name}", digests=True)
        assert cut.shape.hidden_size == 24 and not (tmp_path / "broken" / moments.FOLDER / f"masked-{name}").exists()
        values = cut.read("model.norm.weight")
        assert values.dtype == torch.float32 and bool(values.abs().sum() > 0)
        assert name == "exp_avg" or bool((values >= 0).all())
    finish(file)
    assert [one["loss"] for one in records(tmp_path / "broken") if one["kind"] == "train"] == whole


def test_a_run_that_was_killed_before_they_went_lets_them_go(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "drop_moments", lambda _: die())
    with pytest.raises(Killed):
        run(tiny, tmp_path / "run", 8, ["prune", "finalize", "pretrain"])
    assert (tmp_path / "run/pretrain/done.json").exists() and (tmp_path / "run" / moments.FOLDER).exists()
    monkeypatch.undo()
    run(tiny, tmp_path / "run", 8, ["prune", "finalize", "pretrain"])
    assert not (tmp_path / "run" / moments.FOLDER).exists()


@pytest.mark.parametrize("settle", [0, 3])
def test_masks_that_have_not_settled_hand_nothing_on(tiny: Tiny, tmp_path: Path, settle: int) -> None:
    prune = SETTLING | {"batch": phase(8), "freeze_steps": settle}
    finish(tiny.config(tmp_path / "run", run={"seed": 3, "phases": ["prune", "finalize"]}, prune=prune))
    assert not (tmp_path / "run" / moments.FOLDER).exists(), "not settled, or nothing goes on"


@pytest.mark.parametrize("settle", [0, 3])
def test_a_fresh_start_is_told_where_moments_would_have_been_handed_on(
    tiny: Tiny, tmp_path: Path, settle: int, caplog: pytest.LogCaptureFixture
) -> None:
    prune = SETTLING | {"batch": phase(8), "freeze_steps": settle}
    for phases in (["prune", "finalize"], ["pretrain"]):
        finish(tiny.config(tmp_path / "run", run={"seed": 3, "phases": phases}, prune=prune))
    assert ("Adam starts fresh: run.phases did not name pretrain" in caplog.text) == bool(settle)


def test_moments_are_handed_on_where_the_teacher_goes(tiny: Tiny, tmp_path: Path) -> None:
    """They are those of the mixed loss; the first steps without a teacher are by them."""
    keys = ["prune.distillation.weight=1", "pretrain.distillation.weight=0"]
    kept, fresh = (
        run(tiny, tmp_path / name, 8, ["prune", "finalize", "pretrain"], name, *keys) for name in ("pruned", "fresh")
    )
    np.testing.assert_array_equal(fresh[:9], kept[:9])
    assert np.abs(np.array(fresh[9:]) - kept[9:]).max() > 1e-3
