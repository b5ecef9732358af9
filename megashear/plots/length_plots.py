"""Plot document lengths of a dataset: share of documents and of tokens by power of two, per domain."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megashear.plots.plot_style import GREY, PALETTE, STYLE, new_figure, panel, per_cent
from megashear.preprocess.dataset_report import DomainReport

WIDTH, HEIGHT, COLUMNS = 2.35, 1.35, 3  # inches of a panel; panels side by side


def draw_lengths(reports: Sequence[DomainReport]) -> Figure:
    """A figure of all domains on one axis of lengths (tokens, logarithmic)."""
    columns = min(COLUMNS, len(reports))
    rows = -(-len(reports) // columns)
    bins = max(len(report.documents_L) for report in reports)
    width, height = 0.75 + columns * (WIDTH + 0.45), 1.05 + rows * (HEIGHT + 0.65)
    with matplotlib.rc_context(rc=STYLE):  # type: ignore[arg-type]
        figure = new_figure(
            max(width, 5.5), height, "Lengths of documents", "Share of documents (bars) and of tokens (line) by length"
        )
        for number, report in enumerate(reports):
            row, column = divmod(number, columns)
            left, bottom = 0.7 + column * (WIDTH + 0.45), height - 0.95 - (row + 1) * HEIGHT - row * 0.65
            axes = panel(figure, left, bottom, WIDTH, HEIGHT)
            draw_domain(axes, report, bins)
            if row == rows - 1 or number + columns >= len(reports):
                axes.set_xlabel("tokens")
    return figure


def draw_domain(axes: matplotlib.axes.Axes, report: DomainReport, bins: int) -> None:
    """One domain: bars of documents, a line of tokens, bin i standing for 2^i to 2^(i+1) - 1 tokens."""
    place = np.arange(len(report.documents_L)) + 0.5
    axes.bar(place, report.documents_L / max(report.documents, 1), width=0.9, color=PALETTE[5])
    axes.plot(place, report.tokens_L / max(report.tokens, 1), color=PALETTE[1], marker="o", markersize=2.5, linewidth=1)
    axes.set_xlim(0, bins)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(max(1, 2 * round(bins / 8))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: thousands(2**x)))
    axes.yaxis.set_major_formatter(FuncFormatter(per_cent))
    axes.set_title(report.name, pad=12)
    words = f"{report.documents:,} documents, {report.tokens:,} tokens"
    axes.text(0, 1.02, words, transform=axes.transAxes, fontsize=7.5, color=GREY, va="bottom")


def thousands(value: float) -> str:
    """A power of two as a tick label: 512, 1k, 64k, 1M."""
    for factor, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"
