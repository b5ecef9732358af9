"""What a report says was kept: by what criteria, of what stays alone, for both methods of pruning."""

from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic_run import Page, make_run, phase_done
from megashear.plots.run_plots import read_masks
from megashear.report.run_report import write_report

pytestmark = pytest.mark.medium  # draws many pictures

pytestmark = pytest.mark.usefixtures("small_pictures")


def rows(run: Path) -> dict[str, list[str]]:
    """The first table with such a row: granularity -> open, kept, borderline, lowest."""
    cells = Page(write_report(run)).cells
    names = ("hidden", "group", "query", "head", "intermediate", "layer")
    start = cells.index("kept by the cut")
    return {name: cells[cells.index(name, start) + 1 :][:4] for name in names if name in cells[start:]}


def test_units_of_dropped_layers_are_neither_counted_nor_listed(tmp_path: Path) -> None:
    """Three of four layers stay, in each 5 of 8 heads and 40 of 64 intermediate units."""
    run = make_run(tmp_path / "mine")
    found = rows(run)
    assert found["head"] == ["15 of 32", "15", "3", "0.125"]
    assert found["intermediate"][:2] == ["120 of 256", "120"]
    assert found["group"] == ["-", "15", "-", "-"] and found["hidden"][:2] == ["20 of 32", "20"]
    with np.load(run / "masks.npz") as masks:
        gone = int(np.flatnonzero(masks["layer"] == 0)[0])
        assert masks["head"][gone].any(), "a mask of its own, which the picture must not show"
    cells = Page(write_report(run)).cells
    start = cells.index("mask of the layer")
    listed = [cells[cells.index(str(row), start) + 1 :][:3] for row in range(4)]
    assert listed[gone] == ["pruned", "-", "-"]
    assert all(one[1:] == ["5 of 8", "40 of 64"] for row, one in enumerate(listed) if row != gone)
    shown = read_masks(run / "masks.npz")
    assert not shown["head"][gone].any() and not shown["intermediate"][gone].any()


def test_one_shot_pruning_tells_what_the_cut_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", ["prune.method=one_shot"])
    phase_done(run, "prune", (), 0, method="one_shot", criteria={"head": "fisher"}, tokens=0)
    kept = {"hidden": 20, "layer": 3, "group": 6, "query": 12, "head": 12, "intermediate": 1200}
    phase_done(run, "finalize", (), 0, kept=kept, borderline=[])
    found = {name: cells[1:] for name, cells in rows(run).items()}
    assert found == {name: [f"{number:,}", "-", "-"] for name, number in kept.items()}


def test_one_shot_pruning_names_its_criteria(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", ["prune.method=one_shot", "prune.importance.criterion=fisher"], finished=False)
    for name in ("metrics.jsonl", "masks.npz"):
        (run / name).unlink()
    criteria = {"head": "fisher", "layer": "block_influence"}
    spent = {"calibration_tokens": 65_536, "calibration_flops": 1.5e12, "evaluation_seconds": 30.0}
    phase_done(run, "prune", (), 0, method="one_shot", criteria=criteria, tokens=0, **spent)
    cells = Page(write_report(run)).cells
    said = "Chosen at once: head by fisher, layer by block_influence; nothing was trained before the cut."
    assert said in cells and not any("principal" in cell for cell in cells)
    at = cells.index("calibration")
    assert cells[at : at + 6] == ["calibration", "65.5 k", "-", "1.5e+12", "-", "-"]
    phase_done(run, "prune", (), 0, method="one_shot", criteria=criteria, tokens=0, principal=True, refit=16)
    cells = Page(write_report(run)).cells
    assert "Hidden units are principal directions of the source's residual stream." in cells
    assert "Output matrices of what was kept were fitted to the source by least squares." in cells
