"""Plot domain weights, realised mixture, epochs, and held-out losses against their references, over steps."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megashear.plots.metric_series import Phase, names_in, realised_mix
from megashear.plots.plot_style import (
    GREY,
    domain_lines,
    label_ends,
    line_styles,
    markers,
    new_figure,
    per_cent,
    phase_panels,
)

TITLE = "Domain weights and the mix that was read"
LEGEND = "line: weight set by the last evaluation   ring: share of the tokens read between two evaluations"


def draw_weights(phases: Sequence[Phase], title: str = TITLE, subtitle: str = LEGEND) -> Figure | None:
    """Lines: weights after each update; rings: share of the tokens read between two updates. None without either."""
    domains = names_in(phases, "eval", "weights") or names_in(phases, "train", "domain_tokens")
    drawn = [s for s in phases if s.records.get("eval") or s.records.get("train")]
    if not domains or not drawn:
        return None
    figure, axes, styles = domain_lines(title, subtitle, domains, drawn)
    smallest, ends = 1.0, dict.fromkeys(domains, np.nan)
    for phase, panel in zip(drawn, axes, strict=True):
        steps = phase.steps("eval")
        middles, shares = realised_mix(phase, domains, intervals=16 if len(domains) <= 8 else 8)
        for domain, share in zip(domains, shares, strict=True):
            weight = phase.values("eval", "weights", domain)
            colour = styles[domain]["color"]
            panel.plot(middles, share, "o", ms=3.4, mfc="white", mec=colour, mew=0.8, zorder=4, clip_on=False)
            seen = np.concatenate([weight, share])
            smallest = min([smallest, *seen[seen > 0]])
            if len(weight):
                x, y = np.append(steps, phase.last_step()), np.append(weight, weight[-1])
                panel.plot(x, y, drawstyle="steps-post", zorder=3, **styles[domain], **markers(len(weight)))
            if len(seen):
                ends[domain] = seen[len(weight) - 1] if len(weight) else seen[-1]
    if smallest < 0.02:
        axes[0].set_yscale("log", nonpositive="mask")
        axes[0].set_ylim(smallest / 1.4, 1.0)
        axes[0].yaxis.set_major_locator(LogLocator(10))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    else:
        axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(FuncFormatter(per_cent))
    axes[0].set_ylabel("share of the mixture")
    label_ends(axes[-1], ends, styles)
    return figure


def draw_epochs(phases: Sequence[Phase]) -> Figure | None:
    """Lines: epochs of each domain so far, from 0 in every phase. None where nothing was recorded."""
    domains = names_in(phases, "train", "domain_epochs")
    drawn = [phase for phase in phases if phase.records.get("train")]
    if not domains or not drawn:
        return None
    figure, axes, styles = domain_lines(
        "Epochs of each domain",
        "sequences read of a domain's training data, over the sequences that it has",
        domains,
        drawn,
    )
    ends = dict.fromkeys(domains, np.nan)
    for phase, panel in zip(drawn, axes, strict=True):
        steps = np.concatenate([[0.0], phase.steps("train")])
        for domain in domains:
            epochs = np.concatenate([[0.0], phase.values("train", "domain_epochs", domain)])
            panel.plot(steps, epochs, zorder=3, **styles[domain])
            ends[domain] = epochs[-1]
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("epochs")
    label_ends(axes[-1], ends, styles)
    return figure


def draw_losses(phases: Sequence[Phase]) -> Figure | None:
    """A small picture a domain; band: 1.96 standard errors; dashed: the reference loss. None without evaluations."""
    drawn = [phase for phase in phases if phase.records.get("eval")]
    domains = names_in(drawn, "eval", "loss")
    if not domains:
        return None
    styles = line_styles(domains)
    columns = min(len(domains), 3 if len(domains) in (3, 5, 6, 9) else 4)
    rows = math.ceil(len(domains) / columns)
    each_width, each_height = (3.1, 1.95) if columns == 4 else (3.6, 2.2)
    figure = new_figure(
        max(0.35 + columns * each_width, 5.6),
        0.8 + rows * each_height,
        "Held-out loss per domain",
        "band: 95% interval of the evaluation's error   dashed: reference loss   each phase has its own scale",
    )
    top = figure.get_size_inches()[1] - 0.62
    for index, domain in enumerate(domains):
        row, column = divmod(index, columns)
        box = (
            0.6 + column * each_width,
            top - (row + 1) * each_height + 0.42,
            each_width - (0.95 if len(drawn) > 1 else 0.6),
            each_height - 0.8,
        )
        axes = phase_panels(figure, box, drawn, shared=False)
        for phase, panel in zip(drawn, axes, strict=True):
            steps, loss = phase.steps("eval"), phase.values("eval", "loss", domain)
            error = 1.96 * np.nan_to_num(phase.values("eval", "error", domain))
            colour = styles[domain]["color"]
            panel.fill_between(steps, loss - error, loss + error, color=colour, alpha=0.22, lw=0)
            panel.plot(steps, loss, color=colour, **markers(len(steps)))
            reference = phase.values("eval", "reference", domain)
            x, y = [0, *steps, phase.last_step()], [reference[0], *reference, reference[-1]]
            panel.plot(x, y, color=GREY, lw=1.1, linestyle=(0, (4, 2)))
            panel.locator_params(axis="y", nbins=5)
            if index + columns >= len(domains):
                panel.set_xlabel("step")
        axes[0].set_title(domain, color=styles[domain]["color"], pad=13 if len(drawn) > 1 else 5)
        if column == 0:
            axes[0].set_ylabel("nats per token")
    return figure
