"""Expected against target sparsity, and the Lagrange multipliers that close the gap. Read next: `masks.py`."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megashear.plot.series import Stage, names_in
from megashear.plot.style import GREY, label_ends, line_styles, markers, new_figure, panel, per_cent, step_axis


def draw_sparsity(stages: Sequence[Stage]) -> Figure | None:
    """A small picture a granularity: expected sparsity (line), the schedule's target (dashed). None without masks."""
    drawn = [stage for stage in stages if stage.records.get("mask")]
    names = names_in(drawn, "mask", "expected")
    if not names:
        return None
    styles = line_styles(names)
    each, height = 2.55, 1.9
    figure = new_figure(
        max(0.5 + each * len(names), 5.6), height + 1.4, "Sparsity while pruning", "line: expected   dashed: target"
    )
    stage = drawn[0]
    first = None
    for index, name in enumerate(names):
        axes = panel(figure, 0.65 + index * each, 0.5, each - 0.4, height, sharey=first)
        steps, expected = stage.steps("mask"), stage.values("mask", "expected", name)
        target = stage.values("mask", "target", name)
        axes.plot(steps, expected, color=styles[name]["color"], **markers(len(steps)))
        axes.plot(steps, target, color=GREY, lw=1.1, linestyle=(0, (4, 2)))
        axes.set_title(f"{name}  {expected[-1]:.1%} of {target[-1]:.1%}", color=styles[name]["color"])
        axes.set_xlabel("step")
        step_axis(axes, stage.last_step(), each - 0.4)
        if first is None:
            first = axes
            axes.set_ylabel("share of units masked")
        else:
            axes.tick_params(labelleft=False, left=False)
    assert first is not None
    first.set_ylim(bottom=0)
    first.yaxis.set_major_formatter(FuncFormatter(per_cent))
    return figure


def draw_multipliers(stages: Sequence[Stage]) -> Figure | None:
    """lambda1 (linear) and lambda2 (quadratic) of every granularity over steps. None without masks, and where no
    multiplier has moved, as under the projected constraint.
    """
    drawn = [stage for stage in stages if stage.records.get("mask")]
    names = names_in(drawn, "mask", "lambda1")
    if not any(drawn[0].values("mask", field, name).any() for field in ("lambda1", "lambda2") for name in names):
        return None
    styles, stage = line_styles(names), drawn[0]
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
                stage.steps("mask"),
                stage.values("mask", field, name),
                **styles[name],
                **markers(len(stage.steps("mask"))),
            )
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.set_ylabel("multiplier (nats per token)")
        step_axis(axes, stage.last_step(), 2.75)
        label_ends(axes, {name: stage.values("mask", field, name)[-1] for name in names}, styles)
    return figure
