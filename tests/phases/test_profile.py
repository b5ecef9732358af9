"""`--profile` and the share of evaluation: what a run tells of its own time, without a change of its bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import Tiny, differing, results, without_pictures
from megashear.cli import main


@pytest.mark.expensive("torch.profiler writes two traces, which takes most of its time")
def test_a_profiled_run_has_traces_times_and_the_same_bits(
    tiny: Tiny, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with without_pictures():
        assert main(["run", str(tiny.file(folder)), "--profile"]) == 0
    assert sorted(path.name for path in (folder / "profile").iterdir()) == ["pretrain.json.gz", "prune.json.gz"]
    assert differing(results(folder), unbroken) == []
    summary = json.loads((folder / "summary.json").read_text())
    for phase in ("prune", "pretrain"):
        assert 0 < summary["evaluation_seconds"][phase] < summary["seconds"][phase]
