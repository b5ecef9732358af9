"""Folders of checkpoints: which one is the newest, what is kept."""

from pathlib import Path

import pytest

from helpers.tiny import Tiny, break_off
from megashear.checkpoint.checkpoint_store import list_checkpoints, newest_valid, read_masks, read_state, step_folder
from megashear.errors import CheckpointError


def test_names_sort_by_step(tmp_path: Path) -> None:
    for step in (5, 200, 99999999, 40):
        step_folder(tmp_path, step).mkdir()
    for other in (".step-00000300.x.tmp", "step-1", "step-0000000a"):
        (tmp_path / other).mkdir()
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [99999999, 200, 40, 5]


def test_there_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere") is None
    step_folder(tmp_path, 3).mkdir()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        newest_valid(tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(1, [7]), (3, [7, 6, 4])])
def test_the_newest_are_kept(tiny: Tiny, tmp_path: Path, keep: int, left: list[int]) -> None:
    """Checkpoints at every second step, and one of step 7, at which the run was stopped; what a kill left goes."""
    remains = tmp_path / "run/prune/.step-00000001.remains.tmp"
    remains.mkdir(parents=True)
    config = tiny.config(tmp_path / "run", "checkpoint.interval=2", f"checkpoint.keep={keep}")
    assert break_off(config, ("prune", 7))
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "run/prune")] == left
    assert not remains.exists()


def test_what_a_checkpoint_holds(unbroken_folder: Path) -> None:
    pruned, trained = (list_checkpoints(unbroken_folder / phase)[0] for phase in ("prune", "pretrain"))
    state = read_state(pruned)
    assert state.keys() == {"counters", "stream", "mixture", "losses"}
    assert state["counters"]["step"] == 8
    masks = read_masks(pruned)
    assert {"log_alpha.hidden", "log_alpha.hidden.exp_avg", "multipliers.layer", "adam_steps"} <= masks.keys()
    with pytest.raises(CheckpointError, match="holds no masks"):
        read_masks(trained)
