"""Domain weights over steps, and the mix that was really read. Read next: `losses.py`, which drives the weights."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megashear.plot.series import Stage, names_in, realised_mix
from megashear.plot.style import domain_lines, label_ends, markers, per_cent

TITLE = "Domain weights and the mix that was read"
LEGEND = "line: weight set by the last evaluation   ring: share of the tokens read between two evaluations"


def draw_weights(stages: Sequence[Stage], title: str = TITLE, subtitle: str = LEGEND) -> Figure | None:
    """Lines: weights after each update; rings: share of the tokens read between two updates. None without either."""
    domains = names_in(stages, "eval", "weights") or names_in(stages, "train", "domain_tokens")
    drawn = [s for s in stages if s.records.get("eval") or s.records.get("train")]
    if not domains or not drawn:
        return None
    figure, axes, styles = domain_lines(title, subtitle, domains, drawn)
    smallest, ends = 1.0, dict.fromkeys(domains, np.nan)
    for stage, panel in zip(drawn, axes, strict=True):
        steps = stage.steps("eval")
        middles, shares = realised_mix(stage, domains, intervals=16 if len(domains) <= 8 else 8)
        for domain, share in zip(domains, shares, strict=True):
            weight = stage.values("eval", "weights", domain)
            colour = styles[domain]["color"]
            panel.plot(middles, share, "o", ms=3.4, mfc="white", mec=colour, mew=0.8, zorder=4, clip_on=False)
            seen = np.concatenate([weight, share])
            smallest = min([smallest, *seen[seen > 0]])
            if len(weight):
                x, y = np.append(steps, stage.last_step()), np.append(weight, weight[-1])
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
