"""Plot importance scores. Reads the file without torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError, safe_open

from megashear.errors import DataError
from megashear.plots.mask_plots import MASK_COLOURS, frame, layer_axis
from megashear.plots.plot_style import PALETTE, new_figure, panel
from megashear.train.metrics import SCORES_NAME

HEIGHT = 3.3


@dataclass(frozen=True)
class Scores:
    """By granularity: scores, their standard errors, both in log-alpha's shape, and the criteria."""

    units: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    criteria: dict[str, str]


def read_scores(path: Path) -> Scores:
    """The scores in a file of `masks/scores.py`. Raises DataError where it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            criteria = json.loads((file.metadata() or {})["megashear"])["criteria"]
            units, errors = (
                {name: file.get_tensor(f"{kind}/{name}").astype(np.float64) for name in criteria}
                for kind in ("score", "error")
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: not a file of scores ({error}); remove it to draw the rest") from error
    return Scores(units, errors, criteria)


def importance_picture(run_folder: Path) -> Iterator[tuple[str, Figure]]:
    """The picture of a run's scores with its name, or nothing where units were not scored. Raises DataError."""
    path = run_folder / SCORES_NAME
    if path.exists():
        yield "importance", draw_importance(read_scores(path))


def draw_importance(scores: Scores) -> Figure:
    """Layers as bars with their standard error; heads and intermediate units as maps; hidden units sorted.

    Maps show a score as a share of its row's largest, since units are compared within their row alone: heads in their
    order, intermediate units from the largest to the least, so that rows tell how unequal their units are.
    """
    units, errors = scores.units, scores.errors
    named = ", ".join(dict.fromkeys(scores.criteria.values()))
    figure = new_figure(
        12.6, 4.9, f"Importance: {named}", "maps: share of the largest score of a row; bars and bands: standard errors"
    )
    layers = panel(figure, 0.75, 0.6, 1.7, HEIGHT)
    draw_layers(layers, units["layer"], errors["layer"])
    heads = "query" if "query" in units else "group"
    shown = {f"heads ({scores.criteria[heads]})": of_rows(units[heads]).reshape(len(units["layer"]), -1)}
    shown[f"intermediate units, sorted ({scores.criteria['intermediate']})"] = of_rows(
        -np.sort(-units["intermediate"], axis=1)
    )
    for left, width, (title, share) in zip((2.95, 6.05), (2.5, 3.0), shown.items(), strict=True):
        axes = panel(figure, left, 0.6, width, HEIGHT)
        axes.grid(False)
        axes.imshow(share, cmap=MASK_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        frame(axes, share.shape[1], share.shape[0])
        layer_axis(axes, share.shape[0], labelled=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(title, pad=6)
    hidden = panel(figure, 9.85, 0.6, 2.5, HEIGHT)
    draw_hidden(hidden, units["hidden"], errors["hidden"])
    hidden.set_title(f"hidden units, sorted ({scores.criteria['hidden']})", pad=6)
    layers.set_title(f"layers ({scores.criteria['layer']})", pad=6)
    return figure


def of_rows(score: np.ndarray) -> np.ndarray:
    """Scores [.., n] as shares of their row's largest; rows of zeros stay zeros."""
    largest = score.max(axis=-1, keepdims=True)
    share: np.ndarray = np.divide(score, largest, out=np.zeros_like(score), where=largest > 0)
    return share


def draw_layers(axes: Axes, score: np.ndarray, error: np.ndarray) -> None:
    """score, error: [L]."""
    axes.barh(np.arange(len(score)), score, xerr=error, height=0.8, color=PALETTE[0], ecolor="#333333")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_xlabel("score")
    layer_axis(axes, len(score), labelled=True)


def draw_hidden(axes: Axes, score: np.ndarray, error: np.ndarray) -> None:
    """score, error: [d]."""
    order = np.argsort(-score, kind="stable")
    place = np.arange(len(score))
    score, error = score[order], error[order]
    axes.fill_between(place, score - error, score + error, color=PALETTE[0], alpha=0.25, lw=0)
    axes.plot(place, score, color=PALETTE[0])
    axes.set_xlim(0, max(1, len(score) - 1))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("score")
