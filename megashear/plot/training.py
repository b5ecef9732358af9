"""Training loss and throughput over steps. Read next: `run.py`."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megashear.plot.series import Stage
from megashear.plot.style import GREY, PALETTE, markers, new_figure, stage_panels


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values (fewer at the ends), NaN left out; [n] -> [n]."""
    kernel = np.ones(min(width, len(values)))
    known = np.isfinite(values)
    number = np.convolve(known.astype(float), kernel, "same")
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def draw_training(stages: Sequence[Stage]) -> Figure | None:
    """Thin: as recorded; thick: mean over a fiftieth of the records, dashed that of a teacher's own loss, while it is
    there. None without training records.
    """
    drawn = [stage for stage in stages if stage.records.get("train")]
    if not drawn:
        return None
    skipped = "   ".join(
        f"{stage.name}: {stage.values('train', 'skipped')[-1]:.0f} steps skipped"
        for stage in drawn
        if np.nan_to_num(stage.values("train", "skipped")[-1]) > 0
    )
    taught = any(np.isfinite(stage.values("train", "teacher_loss")).any() for stage in drawn)
    dashed = "dashed: the teacher's on the same text, while it teaches" if taught else ""
    subtitle = "   ".join(filter(None, ["thin: as recorded   thick: running mean", dashed, skipped]))
    figure = new_figure(9.2, 5.4, "Training loss and throughput", subtitle)
    for field, label, box in (
        ("loss", "training loss (nats per token)", (0.85, 2.4, 8.1, 2.15)),
        ("tokens_per_second", "tokens per second", (0.85, 0.55, 8.1, 1.35)),
    ):
        axes = stage_panels(figure, box, drawn, named=field == "loss")
        for stage, panel in zip(drawn, axes, strict=True):
            steps, values = stage.steps("train"), stage.values("train", field)
            panel.plot(steps, values, color=PALETTE[0], lw=0.6, alpha=0.45)
            width = max(3, len(values) // 50)
            panel.plot(steps, running_mean(values, width), color=PALETTE[0], **markers(len(steps)))
            if field == "loss" and taught:
                _draw_teacher(panel, stage, width)
            if field == "tokens_per_second":
                panel.set_xlabel("step")
        axes[0].set_ylabel(label)
        if field == "tokens_per_second":
            axes[0].set_ylim(bottom=0)
            axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1000:,g}k" if y >= 1000 else f"{y:g}"))
            axes[0].locator_params(axis="y", nbins=4)
    return figure


def _draw_teacher(panel: Axes, stage: Stage, width: int) -> None:
    """Running mean of the teacher's loss over the steps that had one, which may be none of this stage's."""
    losses = stage.values("train", "teacher_loss")
    there = np.isfinite(losses)
    if there.any():
        panel.plot(stage.steps("train")[there], running_mean(losses[there], width), color=GREY, ls="--", lw=1.0)
