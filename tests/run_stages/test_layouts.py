"""Runs of several ranks: resumed on their layout they keep their bits, on another one their data and their losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from run_stages.tiny import Tiny, differing, finish, job, records, results, run_jobs

TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
PIPELINE = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "target.num_layers=4"]
STOPS = [("prune", 3), ("pretrain", 3)]


def losses(folder: Path) -> np.ndarray:
    """All training losses in order."""
    return np.array([one["loss"] for one in records(folder) if one["kind"] == "train"])


def data(found: dict[str, Any]) -> list[Any]:
    """The state of the data stream at the end of each stage."""
    return [
        found[name][1]["stream"] | {"weights": None, "remainders": None} for name in sorted(found) if " step-" in name
    ]


def test_tensor_parallel_runs_resume_with_the_same_bits(tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any]) -> None:
    files = [tiny.file(tmp_path / name) for name in ("whole", "stopped")]
    run_jobs(2, tmp_path, [job(files[0], *TENSOR), job(files[1], *TENSOR, stop=STOPS)])
    whole = results(tmp_path / "whole")
    assert differing(results(tmp_path / "stopped"), whole) == []
    assert data(whole) == data(unbroken)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_interleaved_pipelines_resume_with_the_same_bits(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    overrides = [*PIPELINE, f"precision={precision}"]
    files = [tiny.file(tmp_path / name) for name in ("whole", "stopped")]
    run_jobs(2, tmp_path, [job(files[0], *overrides), job(files[1], *overrides, stop=STOPS)])
    assert differing(results(tmp_path / "stopped"), results(tmp_path / "whole")) == []


def test_a_run_goes_on_under_other_layouts(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any], unbroken_folder: Path
) -> None:
    """Tensor parallel, then data parallel, then one process: the same data in the same order, losses to rounding."""
    file = tiny.file(tmp_path / "run")
    run_jobs(2, tmp_path, [job(file, *TENSOR, stop=[("prune", 3)], finish=False)])
    run_jobs(2, tmp_path, [job(file, stop=[("prune", 6), ("pretrain", 2)], finish=False)])
    finish(tiny.config(tmp_path / "run"))
    found = results(tmp_path / "run")
    assert data(found) == data(unbroken)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(unbroken_folder), rtol=2e-5)
