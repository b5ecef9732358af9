"""Style of the plots: colours, fonts, panels in inches, labels at the ends of lines, saving.

Colours are distinguishable for colour-blind readers (Okabe and Ito 2008, without yellow) and belong to a name: a domain
has the same colour in every plot. From the eighth name on the dash pattern changes too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megashear.files.atomic import atomic_file
from megashear.plots.metric_series import Phase

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
GREY = "#6B6B6B"
DPI = 200
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a domain's name may hold dollar signs
}


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash pattern by name, as keywords of `Axes.plot`."""
    return {
        name: {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)]}
        for i, name in enumerate(names)
    }


def markers(points: int) -> dict[str, Any]:
    """Keywords of `Axes.plot` that show the points themselves where they are few: a line through one is not seen."""
    return {"marker": "o", "markersize": 3} if points <= 12 else {}


def label_room(names: Sequence[str]) -> float:
    """Inches right of an axes that `label_ends` needs for these names."""
    return 0.4 + 0.075 * max(len(name) for name in names)


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure of width x height inches with a title and, below it, one line on how to read it."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.12 / width, 1 - 0.12 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.38 / height, subtitle, fontsize=8.5, color=GREY, va="top")
    return figure


def panel(figure: Figure, left: float, bottom: float, width: float, height: float, **keywords: Any) -> Axes:
    """Axes at a place given in inches from the figure's lower left corner."""
    full_width, full_height = figure.get_size_inches()
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height), **keywords
    )


def phase_panels(
    figure: Figure,
    box: tuple[float, float, float, float],
    phases: Sequence[Phase],
    shared: bool = True,
    named: bool = True,
) -> list[Axes]:
    """One axes a phase side by side in `box` (left, bottom, width, height in inches); x is the step.

    shared: one y axis for all phases; otherwise the later phase has its own, on the right. named: the phase's name is
    above its axes, where there are several.
    """
    left, bottom, width, height = box
    gap = 0.09
    each = (width - gap * (len(phases) - 1)) / len(phases)
    axes: list[Axes] = []
    for index, phase in enumerate(phases):
        place = (left + index * (each + gap), bottom, each, height)
        new = panel(figure, *place, sharey=axes[0] if axes and shared else None)
        if axes:
            new.tick_params(labelleft=False, left=False, labelright=not shared, right=not shared)
            new.spines["left"].set_color("#CCCCCC")
            new.spines["left"].set_linestyle((0, (2, 2)))
            new.spines["right"].set_visible(not shared)
        step_axis(new, phase.last_step(), each, last=index == len(phases) - 1)
        if named and len(phases) > 1:
            new.text(0.5, 1.0, phase.name, transform=new.transAxes, ha="center", va="bottom", fontsize=8, color=GREY)
        axes.append(new)
    return axes


def domain_lines(
    title: str, subtitle: str, domains: Sequence[str], phases: Sequence[Phase]
) -> tuple[Figure, list[Axes], dict[str, dict[str, Any]]]:
    """A figure for a line a domain: one axes a phase, room for the names right of the last, and the lines' styles."""
    figure = new_figure(8.05 + label_room(domains), 4.6, title, subtitle)
    axes = phase_panels(figure, (0.75, 0.55, 7.3, 3.2), phases)
    for one in axes:
        one.set_xlabel("step")
    return figure, axes, line_styles(domains)


def step_axis(axes: Axes, last_step: int, width: float, last: bool = True) -> None:
    """Steps from 0 to the phase's last, in thousands from 10 000 on.

    width: inches, says how many labels have room; last: nothing stands to the right, so that a label may reach out.
    """
    axes.set_xlim(0, last_step)
    places = MaxNLocator(max(2, round(width / 0.6)), integer=True, steps=[1, 2, 5, 10]).tick_values(0, last_step)
    end = last_step * (1 if last else 1 - 0.15 / width)
    axes.set_xticks([place for place in places if 0 <= place <= end])
    thousands = last_step >= 10_000
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if thousands and x else f"{x:,.0f}"))


def per_cent(value: float, position: int | None = None) -> str:
    """A share as a tick label."""
    return f"{100 * value:g}%"


def spread(places: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Places moved as little as need be to stand `gap` apart, within low..high where they fit, in the same order."""
    order = np.argsort(places, kind="stable")
    groups: list[list[float]] = []  # each: wished centre, number of places
    for place in places[order]:
        groups.append([float(place), 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            centre, size = groups.pop()
            before, others = groups.pop()
            groups.append([(centre * size + before * others) / (size + others), size + others])
        room = gap * (groups[-1][1] - 1) / 2
        groups[-1][0] = max(min(groups[-1][0], high - room), low + room)
    spaced = [centre + gap * (i - (size - 1) / 2) for centre, size in groups for i in range(int(size))]
    result = np.empty(len(places))
    for i in range(len(spaced) - 2, -1, -1):  # the upper edge may have pushed groups together
        spaced[i] = min(spaced[i], spaced[i + 1] - gap)
    result[order] = spaced
    return result


def label_ends(axes: Axes, ends: Mapping[str, float], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each line's name right of the axes at its last value, kept apart, in the line's colour."""
    shown = {name: value for name, value in ends.items() if np.isfinite(value)}
    if not shown:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.get_ylim()  # settles the limits that the transform needs
    wished = np.array([to_axes.transform((0.0, value))[1] for value in shown.values()])
    height = axes.get_window_extent().height / axes.figure.dpi
    for name, at, place in zip(shown, wished, spread(wished, 0.155 / height, 0.0, 1.0), strict=True):
        colour = styles[name]["color"]
        axes.annotate(
            name,
            xy=(1.0, at),
            xytext=(1.0, place),
            xycoords="axes fraction",
            textcoords=axes.transAxes + _shift(axes, 14),
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _shift(axes: Axes, points: float) -> Any:
    """A transform that moves to the right by `points`."""
    from matplotlib.transforms import ScaledTranslation

    return ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all. Raises StorageError."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return path
