"""Plot training loss, throughput, step time against computed FLOPs, sparsity and multipliers over steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megashear.plots.metric_series import Phase, names_in
from megashear.plots.plot_style import (
    GREY,
    PALETTE,
    label_ends,
    line_styles,
    markers,
    new_figure,
    panel,
    per_cent,
    phase_panels,
    step_axis,
)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values (fewer at the ends), NaN left out; [n] -> [n]."""
    kernel = np.ones(min(width, len(values)))
    known = np.isfinite(values)
    number = np.convolve(known.astype(float), kernel, "same")
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def draw_training(phases: Sequence[Phase]) -> Figure | None:
    """Thin: as recorded; thick: mean over a fiftieth of the records, dashed that of a teacher's own loss, while it is
    there. None without training records.
    """
    drawn = [phase for phase in phases if phase.records.get("train")]
    if not drawn:
        return None
    skipped = "   ".join(
        f"{phase.name}: {phase.values('train', 'skipped')[-1]:.0f} steps skipped"
        for phase in drawn
        if np.nan_to_num(phase.values("train", "skipped")[-1]) > 0
    )
    distilled = any(np.isfinite(phase.values("train", "teacher_loss")).any() for phase in drawn)
    dashed = "dashed: the teacher's loss on the same text" if distilled else ""
    subtitle = "   ".join(filter(None, ["thin: as recorded   thick: running mean", dashed, skipped]))
    figure = new_figure(9.2, 5.4, "Training loss and throughput", subtitle)
    for field, label, box in (
        ("loss", "training loss (nats per token)", (0.85, 2.4, 8.1, 2.15)),
        ("tokens_per_second", "tokens per second", (0.85, 0.55, 8.1, 1.35)),
    ):
        axes = phase_panels(figure, box, drawn, named=field == "loss")
        for phase, drawn_on in zip(drawn, axes, strict=True):
            steps, values = phase.steps("train"), phase.values("train", field)
            drawn_on.plot(steps, values, color=PALETTE[0], lw=0.6, alpha=0.45)
            width = max(3, len(values) // 50)
            drawn_on.plot(steps, running_mean(values, width), color=PALETTE[0], **markers(len(steps)))
            if field == "loss" and distilled:
                _draw_teacher(drawn_on, phase, width)
            if field == "tokens_per_second":
                drawn_on.set_xlabel("step")
        axes[0].set_ylabel(label)
        if field == "tokens_per_second":
            axes[0].set_ylim(bottom=0)
            axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1000:,g}k" if y >= 1000 else f"{y:g}"))
            axes[0].locator_params(axis="y", nbins=4)
    return figure


def _draw_teacher(panel: Axes, phase: Phase, width: int) -> None:
    """Running mean of the teacher's loss over the steps that had one, which may be none of this phase's."""
    losses = phase.values("train", "teacher_loss")
    there = np.isfinite(losses)
    if there.any():
        panel.plot(phase.steps("train")[there], running_mean(losses[there], width), color=GREY, ls="--", lw=1.0)


def draw_speed(phases: Sequence[Phase]) -> Figure | None:
    """Left: live FLOPs and step time over steps, as shares of the dense model and of the slowest step; right: one
    against the other. None where live units were not recorded.
    """
    phase = next((one for one in phases if one.name == "prune"), None)
    if phase is None:
        return None
    share_by_step = dict(zip(phase.steps("mask"), phase.values("mask", "live_flops"), strict=True))
    steps, seconds = phase.steps("train"), phase.values("train", "step_seconds")
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
    step_axis(over_steps, phase.last_step(), 4.4)
    against = panel(figure, 6.0, 0.5, 3.0, 2.3)
    against.plot(share, seconds, ".", color=PALETTE[1], alpha=0.6, markersize=4)
    against.set_xlabel("live FLOPs")
    against.set_ylabel("seconds a step")
    against.set_xlim(0, 1.05)
    against.set_ylim(0, float(seconds.max()) * 1.05)
    against.xaxis.set_major_formatter(FuncFormatter(per_cent))
    return figure


def draw_sparsity(phases: Sequence[Phase]) -> Figure | None:
    """A small picture a granularity: expected sparsity (line), the schedule's target (dashed). None without masks."""
    drawn = [phase for phase in phases if phase.records.get("mask")]
    names = names_in(drawn, "mask", "expected")
    if not names:
        return None
    styles = line_styles(names)
    each, height = 2.55, 1.9
    figure = new_figure(
        max(0.5 + each * len(names), 5.6), height + 1.4, "Sparsity while pruning", "line: expected   dashed: target"
    )
    phase = drawn[0]
    first = None
    for index, name in enumerate(names):
        axes = panel(figure, 0.65 + index * each, 0.5, each - 0.4, height, sharey=first)
        steps, expected = phase.steps("mask"), phase.values("mask", "expected", name)
        target = phase.values("mask", "target", name)
        axes.plot(steps, expected, color=styles[name]["color"], **markers(len(steps)))
        axes.plot(steps, target, color=GREY, lw=1.1, linestyle=(0, (4, 2)))
        axes.set_title(f"{name}  {expected[-1]:.1%} of {target[-1]:.1%}", color=styles[name]["color"])
        axes.set_xlabel("step")
        step_axis(axes, phase.last_step(), each - 0.4)
        if first is None:
            first = axes
            axes.set_ylabel("share of units masked")
        else:
            axes.tick_params(labelleft=False, left=False)
    assert first is not None
    first.set_ylim(bottom=0)
    first.yaxis.set_major_formatter(FuncFormatter(per_cent))
    return figure


def draw_multipliers(phases: Sequence[Phase]) -> Figure | None:
    """lambda1 (linear) and lambda2 (quadratic) of every granularity over steps. None without masks, and where no
    multiplier has moved, as under the projected constraint.
    """
    drawn = [phase for phase in phases if phase.records.get("mask")]
    names = names_in(drawn, "mask", "lambda1")
    if not any(drawn[0].values("mask", field, name).any() for field in ("lambda1", "lambda2") for name in names):
        return None
    styles, phase = line_styles(names), drawn[0]
    figure = new_figure(
        9.2,
        3.7,
        "Lagrange multipliers while pruning",
        "the constraint adds  λ1 (s − t) + λ2 (s − t)²  to the loss; s: expected, t: target sparsity",
    )
    for index, (field, label) in enumerate((("lambda1", "λ1, linear"), ("lambda2", "λ2, quadratic"))):
        axes = panel(figure, 0.75 + index * 4.5, 0.5, 2.75, 2.3)
        for name in names:
            axes.plot(
                phase.steps("mask"),
                phase.values("mask", field, name),
                **styles[name],
                **markers(len(phase.steps("mask"))),
            )
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.set_ylabel("multiplier (nats per token)")
        step_axis(axes, phase.last_step(), 2.75)
        label_ends(axes, {name: phase.values("mask", field, name)[-1] for name in names}, styles)
    return figure
