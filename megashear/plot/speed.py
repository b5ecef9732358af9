"""Step time against the FLOPs that live units leave, while pruning: what closing masks saves. Read next: `run.py`."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megashear.plot.series import Stage
from megashear.plot.style import PALETTE, markers, new_figure, panel, per_cent, step_axis


def draw_speed(stages: Sequence[Stage]) -> Figure | None:
    """Left: live FLOPs and step time over steps, as shares of the dense model and of the slowest step; right: one
    against the other. None where live units were not recorded.
    """
    stage = next((one for one in stages if one.name == "prune"), None)
    if stage is None:
        return None
    share_by_step = dict(zip(stage.steps("mask"), stage.values("mask", "live_flops"), strict=True))
    steps, seconds = stage.steps("train"), stage.values("train", "step_seconds")
    share = np.array([share_by_step.get(step, np.nan) for step in steps])
    known = np.isfinite(share) & np.isfinite(seconds)
    if not known.any():
        return None
    steps, share, seconds = steps[known], share[known], seconds[known]
    subtitle = "live FLOPs: of the units whose mask is not 0, as a share of the source's"
    figure = new_figure(9.2, 3.7, "Step time while masks close", subtitle)
    over_steps = panel(figure, 0.75, 0.5, 4.4, 2.3)
    over_steps.plot(steps, share, color=PALETTE[0], **markers(len(steps)), label="live FLOPs")
    over_steps.plot(steps, seconds / seconds.max(), color=PALETTE[1], **markers(len(steps)), label="step time")
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("share of the largest")
    over_steps.set_ylim(0, 1.05)
    over_steps.yaxis.set_major_formatter(FuncFormatter(per_cent))
    over_steps.legend(frameon=False, loc="upper right")
    step_axis(over_steps, stage.last_step(), 4.4)
    against = panel(figure, 6.0, 0.5, 3.0, 2.3)
    against.plot(share, seconds, ".", color=PALETTE[1], alpha=0.6, markersize=4)
    against.set_xlabel("live FLOPs")
    against.set_ylabel("seconds a step")
    against.set_xlim(0, 1.05)
    against.set_ylim(0, float(seconds.max()) * 1.05)
    against.xaxis.set_major_formatter(FuncFormatter(per_cent))
    return figure
