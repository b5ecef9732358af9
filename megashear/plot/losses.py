"""Held-out loss of each domain against its reference, with the evaluation's error. Read next: `training.py`."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megashear.plot.series import Stage, names_in
from megashear.plot.style import GREY, line_styles, markers, new_figure, stage_panels


def draw_losses(stages: Sequence[Stage]) -> Figure | None:
    """A small picture a domain; band: 1.96 standard errors; dashed: the reference loss. None without evaluations."""
    drawn = [stage for stage in stages if stage.records.get("eval")]
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
        "band: 95% interval of the evaluation's error   dashed: reference loss   each stage has its own scale",
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
        axes = stage_panels(figure, box, drawn, shared=False)
        for stage, panel in zip(drawn, axes, strict=True):
            steps, loss = stage.steps("eval"), stage.values("eval", "loss", domain)
            error = 1.96 * np.nan_to_num(stage.values("eval", "error", domain))
            colour = styles[domain]["color"]
            panel.fill_between(steps, loss - error, loss + error, color=colour, alpha=0.22, lw=0)
            panel.plot(steps, loss, color=colour, **markers(len(steps)))
            reference = stage.values("eval", "reference", domain)
            x, y = [0, *steps, stage.last_step()], [reference[0], *reference, reference[-1]]
            panel.plot(x, y, color=GREY, lw=1.1, linestyle=(0, (4, 2)))
            panel.locator_params(axis="y", nbins=5)
            if index + columns >= len(domains):
                panel.set_xlabel("step")
        axes[0].set_title(domain, color=styles[domain]["color"], pad=13 if len(drawn) > 1 else 5)
        if column == 0:
            axes[0].set_ylabel("nats per token")
    return figure
