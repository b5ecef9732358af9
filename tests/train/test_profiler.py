"""Traces hold the requested steps only, and are written completely or not at all."""

import gzip
import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from megashear.train.profiler import SKIPPED_STEPS, profiler


def marks(path: Path) -> list[str]:
    """Names of the marks in a trace, in order."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("mark ")})


def walk(path: Path, traced_steps: int, steps: int) -> None:
    with profiler(path, traced_steps) as callbacks:
        for number in range(steps):
            with torch.profiler.record_function(f"mark {number}"):
                torch.ones(3).sum()
            for callback in callbacks:
                callback.after_step(MagicMock(), MagicMock())


def test_requested_steps_are_traced(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "prune.json.gz"
    walk(path, 3, 8)
    assert marks(path) == [f"mark {number}" for number in range(SKIPPED_STEPS, SKIPPED_STEPS + 3)]
    assert [found.name for found in path.parent.iterdir()] == ["prune.json.gz"]


def test_a_short_phase_is_traced_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    walk(path, 3, SKIPPED_STEPS + 1)
    assert marks(path) == [f"mark {SKIPPED_STEPS}"]


@pytest.mark.parametrize(("traced_steps", "steps"), [(0, 5), (3, 0)])
def test_nothing_traced_writes_nothing(tmp_path: Path, traced_steps: int, steps: int) -> None:
    walk(tmp_path / "trace.json.gz", traced_steps, steps)
    assert list(tmp_path.iterdir()) == []
