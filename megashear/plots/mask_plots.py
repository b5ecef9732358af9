"""Plot the masks of a run: kept heads, layers, intermediate and hidden units."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megashear.plots.plot_style import GREY, PALETTE, new_figure, panel, per_cent

# White is gone, dark is kept: told apart in grey and by every kind of colour blindness.
MASK_COLOURS = LinearSegmentedColormap.from_list("mask", ["#FFFFFF", "#9EC9E2", PALETTE[0], "#08306B"])

COLUMNS = 1000  # of a map, at most: more than that are not told apart
PANELS = {"layer": (0.28, 0.8), "head": (3.3, 0.5), "intermediate": (2.0, 0.85), "hidden": (2.3, 0.3)}  # width, gap


def within_layers(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same masks, those of a layer's units ([L, ...]) 0 where the layer's own is: they leave with their layer.

    Raises ValueError where there are other than L rows.
    """
    if "layer" not in masks:
        return dict(masks)
    stays = masks["layer"] != 0
    return {name: mask if mask.ndim == 1 else (mask.T * stays).T for name, mask in masks.items()}


def draw_masks(masks: Mapping[str, np.ndarray]) -> Figure | None:
    """masks: deterministic masks, 0 to 1: hidden [d], head [L, H], intermediate [L, I], layer [L], any of them absent.

    From left to right: layers, heads, density of intermediate units per layer, hidden units sorted. None if empty.
    """
    shown = [name for name in PANELS if name in masks and masks[name].size]
    if not shown:
        return None
    width = 0.75 + sum(sum(PANELS[name]) for name in shown)
    figure = new_figure(max(width, 5.6), 4.9, "Masks", "dark: kept   white: pruned, a value of exactly 0")
    left, first = 0.75, None
    for name in shown:
        axes = panel(figure, left, 0.6, PANELS[name][0], 3.3)
        axes.grid(False)
        mask = np.asarray(masks[name], dtype=np.float64)
        if name == "hidden":
            draw_hidden(axes, mask)
        else:
            {"layer": draw_layers, "head": draw_heads, "intermediate": draw_density}[name](axes, mask)
            layer_axis(axes, mask.shape[0], labelled=first is None)
            first = axes
        axes.set_title(f"{name}: {np.count_nonzero(mask):,}\nof {mask.size:,} kept", pad=6)
        left += sum(PANELS[name])
    return figure


def draw_maps(masks: Mapping[str, np.ndarray]) -> Figure | None:
    """The values of layers x heads above those of layers x intermediate units; masks as for `draw_masks`.

    A column is a unit, or the mean of neighbours where there are more than COLUMNS. None without either.
    """
    shown = [name for name in ("head", "intermediate") if name in masks and masks[name].size]
    if not shown:
        return None
    each = 2.3
    figure = new_figure(9.2, 0.6 + each * len(shown), "Masks, unit by unit", "dark: kept   white: pruned")
    for index, name in enumerate(shown):
        mask = np.asarray(masks[name], dtype=np.float64)
        axes = panel(figure, 0.75, 0.5 + each * (len(shown) - 1 - index), 8.2, each - 0.65)
        axes.grid(False)
        starts = np.arange(0, mask.shape[1], -(-mask.shape[1] // COLUMNS))
        mean = np.add.reduceat(mask, starts, axis=1) / np.diff([*starts, mask.shape[1]])
        place = (-0.5, mask.shape[1] - 0.5, mask.shape[0] - 0.5, -0.5)
        axes.imshow(mean, cmap=MASK_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=place)
        frame(axes, mask.shape[1], mask.shape[0])
        layer_axis(axes, mask.shape[0], labelled=True)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel({"head": "head", "intermediate": "intermediate unit"}[name])
    return figure


def layer_axis(axes: Axes, layers: int, labelled: bool) -> None:
    """Layers from top to bottom as rows."""
    axes.set_ylim(layers - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(min(8, layers), integer=True))
    if labelled:
        axes.set_ylabel("layer")


def draw_layers(axes: Axes, mask: np.ndarray) -> None:
    """mask: [L], as a strip."""
    axes.imshow(mask[:, None], cmap=MASK_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    frame(axes, 1, mask.shape[0])


def draw_heads(axes: Axes, mask: np.ndarray) -> None:
    """mask: [L, H], a cell a head."""
    axes.imshow(mask, cmap=MASK_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    frame(axes, mask.shape[1], mask.shape[0])


def draw_density(axes: Axes, mask: np.ndarray) -> None:
    """mask: [L, I], as the share of each layer's units that are not exactly 0."""
    axes.barh(np.arange(mask.shape[0]), (mask != 0).mean(axis=1), height=0.8, color=PALETTE[0])
    axes.set_xlim(0, 1)
    axes.set_xlabel("intermediate units kept")
    axes.xaxis.set_major_formatter(FuncFormatter(per_cent))
    axes.set_xticks([0, 0.5, 1])


def draw_hidden(axes: Axes, mask: np.ndarray) -> None:
    """mask: [d], sorted from the largest, with a line where the zeros begin."""
    values = np.sort(mask)[::-1]
    axes.fill_between(np.arange(len(values)), values, step="post", color=PALETTE[0], alpha=0.25, lw=0)
    axes.plot(np.arange(len(values)), values, color=PALETTE[0], drawstyle="steps-post")
    kept = int(np.count_nonzero(mask))
    if kept < len(mask):
        axes.axvline(kept, color=GREY, lw=1.0, linestyle=(0, (4, 2)))
    axes.set_xlim(0, len(values))
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("hidden units, sorted")
    axes.set_ylabel("mask value")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def frame(axes: Axes, columns: int, rows: int) -> None:
    """A full frame and, where cells are large enough to be told apart, thin lines between them."""
    for spine in axes.spines.values():
        spine.set_visible(True)
    if columns <= 64 and rows <= 64:
        axes.set_xticks(np.arange(-0.5, columns), minor=True)
        axes.set_yticks(np.arange(-0.5, rows), minor=True)
        axes.grid(True, which="minor", color="#D9D9D9", lw=0.4)
        axes.tick_params(which="minor", length=0)
