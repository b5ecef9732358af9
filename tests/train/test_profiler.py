"""Traces: the steps asked for and no others, whole or not at all."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from megashear.train.profiler import FIRST, traced


def marks(path: Path) -> list[str]:
    """Names of the marks in a trace, in order."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("mark ")})


def walk(path: Path, traced_steps: int, steps: int) -> None:
    with traced(path, traced_steps) as tick:
        for number in range(steps):
            with torch.profiler.record_function(f"mark {number}"):
                torch.ones(3).sum()
            tick()


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "prune.json.gz"
    walk(path, 3, 8)
    assert marks(path) == [f"mark {number}" for number in range(FIRST, FIRST + 3)]
    assert [found.name for found in path.parent.iterdir()] == ["prune.json.gz"]


def test_a_short_phase_gives_what_there_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    walk(path, 3, FIRST + 1)
    assert marks(path) == [f"mark {FIRST}"]


@pytest.mark.parametrize(("traced_steps", "steps"), [(0, 5), (3, 0)])
def test_nothing_is_written_where_nothing_was_traced(tmp_path: Path, traced_steps: int, steps: int) -> None:
    walk(tmp_path / "trace.json.gz", traced_steps, steps)
    assert list(tmp_path.iterdir()) == []
