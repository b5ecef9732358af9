"""Epochs taken of each domain's training data over steps: which text repeats, how often. Read next: `weights.py`."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megashear.plot.series import Stage, names_in
from megashear.plot.style import domain_lines, label_ends


def draw_epochs(stages: Sequence[Stage]) -> Figure | None:
    """Lines: epochs of each domain so far, from 0 in every stage. None where nothing was recorded."""
    domains = names_in(stages, "train", "domain_epochs")
    drawn = [stage for stage in stages if stage.records.get("train")]
    if not domains or not drawn:
        return None
    figure, axes, styles = domain_lines(
        "Epochs of each domain",
        "sequences read of a domain's training data, over the sequences that it has",
        domains,
        drawn,
    )
    ends = dict.fromkeys(domains, np.nan)
    for stage, panel in zip(drawn, axes, strict=True):
        steps = np.concatenate([[0.0], stage.steps("train")])
        for domain in domains:
            epochs = np.concatenate([[0.0], stage.values("train", "domain_epochs", domain)])
            panel.plot(steps, epochs, zorder=3, **styles[domain])
            ends[domain] = epochs[-1]
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("epochs")
    label_ends(axes[-1], ends, styles)
    return figure
