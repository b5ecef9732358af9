"""Runs of several ranks: resumed on their layout they keep their bits, on another one their data and their losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from helpers.budget import slow
from helpers.jobs import job
from helpers.ranks import LiveRanks
from helpers.tiny import Killed, Tiny, differing, finish, records, results
from megashear.mixture.domain_weights import Mixture

TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
PIPELINE = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "target.num_layers=4"]
SHORT = [
    *(f"{phase}.batch.{key}" for phase in ("prune", "pretrain") for key in ("micro_batch=4", "eval_sequences=2")),
    *("prune.batch.steps=4", "prune.batch.eval_interval=4", "pretrain.batch.steps=3", "pretrain.batch.eval_interval=3"),
    "checkpoint.interval=100",
]
"""Few steps, and few collectives in each: what takes the time of a tiny run on two ranks."""


def losses(folder: Path) -> np.ndarray:
    """All training losses in order."""
    return np.array([one["loss"] for one in records(folder) if one["kind"] == "train"])


def data(found: dict[str, Any]) -> list[Any]:
    """The state of the data stream at the end of each phase."""
    return [
        found[name][1]["stream"] | {"weights": None, "remainders": None} for name in sorted(found) if " step-" in name
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([*TENSOR, *SHORT], marks=pytest.mark.expensive("two runs on two ranks, one stopped twice")),
        [*PIPELINE, *SHORT, "precision=bf16"],
        *slow(TENSOR, PIPELINE, [*PIPELINE, "precision=bf16"]),
    ],
    ids=["tensor", "pipeline-bf16", "tensor-whole", "pipeline-whole", "pipeline-bf16-whole"],
)
def test_runs_of_two_ranks_resume_with_the_same_bits(
    ranks: LiveRanks, tiny: Tiny, tmp_path: Path, overrides: list[str]
) -> None:
    """Tensor parallel, and an interleaved pipeline; stopped in both phases."""
    files = [tiny.file(tmp_path / name) for name in ("whole", "stopped")]
    jobs = [job(files[0], *overrides), job(files[1], *overrides, stop=[("prune", 2), ("pretrain", 2)])]
    ranks(2).call("helpers.jobs:run_all", jobs=jobs)
    assert differing(results(tmp_path / "stopped"), results(tmp_path / "whole")) == []


@pytest.mark.expensive("three starts of one run, two of them on two ranks, that must take the same data")
def test_a_run_goes_on_under_other_layouts(
    ranks: LiveRanks, tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any], unbroken_folder: Path
) -> None:
    """Tensor parallel, then data parallel, then one process: the same data in the same order, losses to rounding."""
    file = tiny.file(tmp_path / "run")
    ranks(2).call("helpers.jobs:run_all", jobs=[job(file, *TENSOR, stop=[("prune", 3)], finish=False)])
    ranks(2).call("helpers.jobs:run_all", jobs=[job(file, stop=[("prune", 6), ("pretrain", 2)], finish=False)])
    finish(tiny.config(tmp_path / "run"))
    found = results(tmp_path / "run")
    assert data(found) == data(unbroken)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(unbroken_folder), rtol=2e-5)


def test_killed_within_an_update_of_the_weights_and_resumed_on_two_ranks(
    ranks: LiveRanks, tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any], unbroken_folder: Path
) -> None:
    """The weights have moved and nothing is saved yet; two data-parallel ranks then see the unbroken run's stream."""
    file, original = tiny.file(tmp_path / "run"), Mixture.update

    def update(mixture: Mixture, losses: Mapping[str, float | None], step: int) -> list[str]:
        original(mixture, losses, step)
        if step != 4:
            return []
        raise Killed

    with patch.object(Mixture, "update", update), pytest.raises(Killed):
        finish(tiny.config(tmp_path / "run"))
    ranks(2).call("helpers.jobs:run_all", jobs=[job(file)])
    assert data(results(tmp_path / "run")) == data(unbroken)
    ours, theirs = (
        [one["weights"] for one in records(f) if one["kind"] == "eval"] for f in (file.with_suffix(""), unbroken_folder)
    )
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
