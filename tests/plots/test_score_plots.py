"""The picture of scores: each layer's score with its error, rows of maps by their largest, hidden units sorted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megashear.errors import DataError
from megashear.masks.unit_scores import Scores, save_scores
from megashear.plots.run_plots import plot_run
from megashear.plots.score_plots import draw_importance, read_scores
from megashear.train.metrics import SCORES_NAME

LAYERS, GROUPS, QUERIES = 6, 2, 3


def scores(grouped: bool = True) -> Scores:
    sizes = {
        "hidden": (40,),
        "group": (LAYERS, GROUPS),
        "query": (LAYERS, GROUPS, QUERIES),
        "intermediate": (LAYERS, 24),
        "layer": (LAYERS,),
    }
    if not grouped:
        del sizes["query"]
    generator = torch.Generator().manual_seed(1)
    units = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    return Scores(units, {name: value / 10 for name, value in units.items()}, dict.fromkeys(units, "fisher"))


@pytest.mark.parametrize("grouped", [True, False])
def test_scores_stand_in_the_picture(grouped: bool, tmp_path: Path) -> None:
    given = scores(grouped)
    save_scores(tmp_path / SCORES_NAME, given, {})
    layers, heads, intermediate, hidden = draw_importance(read_scores(tmp_path / SCORES_NAME)).axes
    np.testing.assert_allclose([bar.get_width() for bar in layers.patches], given.units["layer"], rtol=1e-6)
    shown = np.asarray(heads.images[0].get_array())
    wanted = given.units["query" if grouped else "group"]
    np.testing.assert_allclose(shown, (wanted / wanted.amax(-1, keepdim=True)).reshape(LAYERS, -1), rtol=1e-6)
    shown = np.asarray(intermediate.images[0].get_array())
    assert shown.shape == (LAYERS, 24)
    assert (np.diff(shown, axis=1) <= 0).all() and (shown[:, 0] == 1).all()
    (line,) = hidden.lines
    np.testing.assert_allclose(line.get_ydata(), sorted(given.units["hidden"].tolist(), reverse=True), rtol=1e-6)


def test_a_unit_of_no_importance_is_drawn(tmp_path: Path) -> None:
    given = scores()
    given.units["intermediate"][2] = 0.0
    save_scores(tmp_path / SCORES_NAME, given, {})
    assert (
        np.asarray(draw_importance(read_scores(tmp_path / SCORES_NAME)).axes[2].images[0].get_array())[2].tolist()
        == [0.0] * 24
    )


def test_a_run_that_only_scored_has_the_one_picture(tmp_path: Path) -> None:
    save_scores(tmp_path / SCORES_NAME, scores(), {})
    assert plot_run(tmp_path) == [tmp_path / "plots/importance.png"]
    assert (tmp_path / "plots/importance.png").stat().st_size > 10_000
    (tmp_path / SCORES_NAME).write_bytes(b"nothing")
    with pytest.raises(DataError):
        plot_run(tmp_path)
