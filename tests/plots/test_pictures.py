"""What stands in each picture: one artist for each thing recorded, with the recorded numbers."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from helpers.synthetic_run import DOMAINS, TARGETS
from megashear.plots.mask_plots import draw_maps, draw_masks
from megashear.plots.metric_series import Phase, phases_of
from megashear.plots.mixture_plots import draw_losses, draw_weights
from megashear.plots.plot_style import STYLE
from megashear.plots.run_plots import read_masks
from megashear.plots.training_plots import draw_multipliers, draw_sparsity, draw_training
from megashear.train.metrics import read_metrics

DRAWINGS = (draw_weights, draw_losses, draw_sparsity, draw_multipliers, draw_training)


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context(STYLE):
        yield


@pytest.fixture(scope="module")
def phases(published_run: Path) -> list[Phase]:
    return phases_of(read_metrics(published_run / "metrics.jsonl"))


def test_weights_a_line_and_rings_for_each_domain_and_phase(phases: list[Phase]) -> None:
    figure = draw_weights(phases)
    assert figure is not None and len(figure.axes) == 2
    for phase, axes in zip(phases, figure.axes, strict=True):
        lines = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
        assert len(lines) == len(DOMAINS) and len(axes.lines) == 2 * len(DOMAINS)
        drawn = np.array([line.get_ydata()[:-1] for line in lines])
        recorded = np.array([phase.values("eval", "weights", domain) for domain in DOMAINS])
        np.testing.assert_array_equal(drawn, recorded)
    assert [text.get_text() for text in figure.axes[1].texts if text.get_text() in DOMAINS] == list(DOMAINS)


def test_losses_a_cell_for_each_domain(phases: list[Phase]) -> None:
    figure = draw_losses(phases)
    assert figure is not None and len(figure.axes) == 2 * len(DOMAINS)
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == list(DOMAINS)
    for axes in figure.axes:
        loss, reference = axes.lines
        assert len(axes.collections) == 1, "one band"
        assert len(set(reference.get_ydata())) == 1 and len(loss.get_ydata()) in (64, 121)


def test_sparsity_and_multipliers_for_each_granularity(phases: list[Phase]) -> None:
    sparsity, multipliers = draw_sparsity(phases), draw_multipliers(phases)
    assert sparsity is not None and multipliers is not None
    assert [axes.get_title(loc="left").split()[0] for axes in sparsity.axes] == list(TARGETS)
    for axes, final in zip(sparsity.axes, TARGETS.values(), strict=True):
        expected, target = axes.lines
        assert target.get_ydata()[-1] == final and expected.get_ydata()[-1] == pytest.approx(final, abs=1e-6)
    assert [len(axes.lines) for axes in multipliers.axes] == [len(TARGETS)] * 2


def test_multipliers_that_never_moved_are_not_drawn(phases: list[Phase]) -> None:
    for phase in phases:
        for record in phase.records.get("mask", []):
            for field in ("lambda1", "lambda2"):
                record[field] = dict.fromkeys(record[field], 0.0)
    assert draw_multipliers(phases) is None and draw_sparsity(phases) is not None


def test_training_loss_and_throughput(phases: list[Phase]) -> None:
    figure = draw_training(phases)
    assert figure is not None and [len(axes.lines) for axes in figure.axes] == [2] * 4
    assert any("11 steps skipped" in text.get_text() for text in figure.texts)
    assert not any("teacher" in text.get_text() for text in figure.texts)


def test_a_teacher_s_loss_is_drawn_while_it_teaches(phases: list[Phase]) -> None:
    pruning = phases[0].records["train"]
    for record in pruning[:10]:
        record["teacher_loss"] = 2.0
    figure = draw_training(phases)
    assert figure is not None and [len(axes.lines) for axes in figure.axes] == [3, 2, 2, 2]
    steps, losses = figure.axes[0].lines[2].get_data()
    assert list(steps) == [record["step"] for record in pruning[:10]] and list(losses) == [2.0] * 10
    assert any("teacher" in text.get_text() for text in figure.texts)


def test_masks_show_every_cell_and_their_counts(published_run: Path) -> None:
    masks = read_masks(published_run / "masks.npz")
    figure = draw_masks(masks)
    assert figure is not None
    layer, head, intermediate, hidden = figure.axes
    np.testing.assert_array_equal(head.images[0].get_array(), masks["head"])
    np.testing.assert_array_equal(layer.images[0].get_array()[:, 0], masks["layer"])
    assert [bar.get_width() for bar in intermediate.patches] == pytest.approx(
        [(m != 0).mean() for m in masks["intermediate"]]
    )
    assert hidden.get_title(loc="left") == "hidden: 320\nof 512 kept"
    heads_alone = draw_masks({"head": masks["head"]})
    assert heads_alone is not None and len(heads_alone.axes) == 1


def test_units_of_a_dropped_layer_are_drawn_as_dropped(tmp_path: Path) -> None:
    ones = np.ones((2, 3), dtype=np.float32)
    np.savez(tmp_path / "masks.npz", layer=np.array([0.25, 0.0], dtype=np.float32), head=ones, intermediate=ones)
    masks = read_masks(tmp_path / "masks.npz")
    figure, maps = draw_masks(masks), draw_maps(masks)
    assert figure is not None and maps is not None
    _, head, intermediate = figure.axes
    assert head.get_title(loc="left") == "head: 3\nof 6 kept"
    assert [bar.get_width() for bar in intermediate.patches] == [1, 0]
    for axes in (head, *maps.axes):
        np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 1, 1], [0, 0, 0]])


def test_nothing_recorded_no_picture() -> None:
    empty = [Phase("prune", {})]
    assert [draw(empty) for draw in DRAWINGS] == [None] * len(DRAWINGS)
    assert draw_masks({}) is None
