"""Losses and gradients that are not finite: no rank updates, and too many of them in a row stop the run."""

import re
from pathlib import Path
from typing import Any

from faults.conftest import Refuse
from helpers.ranks import LiveRanks
from helpers.tiny import Tiny, records
from megashear.checkpoint.checkpoint_store import list_checkpoints


def test_too_many_in_a_row_stop_the_run(tiny: Tiny, tmp_path: Path, refused: Refuse) -> None:
    """A learning rate that throws the weights to infinity: three steps are skipped, then the samples are named."""
    rate = ["prune.optimizer.learning_rate=1e30", "logging.nonfinite_limit=3"]
    said = refused(
        6, ["not finite in 3 steps in a row", "no weight was changed"], "run", tiny.file(tmp_path / "run"), *rate
    )
    names = re.findall(r"(\w+:\d+)", said.split("Samples of")[1])
    assert len(names) == 8
    assert all(name.partition(":")[0] in ("library", "command", "help") for name in names)
    assert all(name.partition(":")[2].isdigit() for name in names)
    trained = [one for one in records(tmp_path / "run") if one["kind"] == "train"]
    assert [one["skipped"] for one in trained[-2:]] == [1, 2]
    assert {one["grad_norm"] for one in trained[-2:]} == {None}
    assert len(list_checkpoints(tmp_path / "run/prune")) <= 1


def test_one_rank_with_a_nan(ranks: LiveRanks, tiny: Tiny, tmp_path: Path) -> None:
    """In the loss or in one gradient of one of two data-parallel ranks: in that step nobody updates anything."""
    file = tiny.file(tmp_path / "run")
    seen: dict[str, Any] = ranks(2).call("faults.nonfinite_case:poisoned_run", file=str(file))
    assert seen["ranks"][0] == seen["ranks"][1]
    for injected in (3, 5):
        assert seen["ranks"][0][injected - 1] == seen["ranks"][0][injected], "weights, masks, multipliers stand"
    for other in (2, 4, 6):
        assert seen["ranks"][0][other - 1] != seen["ranks"][0][other]
    assert seen["skipped"] == [0, 0, 0, 1, 1, 2, 2]
