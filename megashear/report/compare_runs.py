"""Compare two runs: differences of losses by domain, cost, and both curves in one plot."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megashear.evaluation.losses import (
    DomainSequences,
    Losses,
    loss_cells,
    mean_of,
    other_text,
    paired_difference,
    with_error,
)
from megashear.planning.text_table import count
from megashear.plots.metric_series import names_in
from megashear.plots.plot_style import PALETTE, markers, new_figure, panel
from megashear.report.html_page import Html, paragraph, picture, section, table
from megashear.report.run_cost import costs, curves, trained_tokens
from megashear.report.run_record import RunRecord


def names_of(first: RunRecord, second: RunRecord) -> tuple[str, str]:
    """Names of the runs: their folder names, or paths if those are equal."""
    both = (first.name, second.name)
    return both if both[0] != both[1] else (str(first.folder), str(second.folder))


def comparison(first: RunRecord, second: RunRecord) -> Html:
    """Section that compares two runs."""
    names = names_of(first, second)
    parts = [paragraph(f"{names[0]} beside {names[1]}.")]
    if first.losses and second.losses:
        parts.append(loss_differences(names, first, second))
    else:
        parts.append(paragraph("One of the runs has no held-out losses yet."))
    parts.append(cost_beside(names, (first, second)))
    figure = draw_curves(names, (first, second))
    if figure is not None:
        caption = "Held-out loss over tokens and over training FLOPs of all phases; a line breaks where a phase ends."
        parts.append(picture(figure, caption))
    return section("Comparison", parts)


def loss_differences(names: Sequence[str], first: RunRecord, second: RunRecord) -> Html:
    """Losses of both runs by domain, second - first, and whether the difference exceeds two standard errors.

    Notes domains that only one run has, and evaluations on different sequences.
    """
    (column, mine), (other_column, other) = (list(run.losses.items())[-1] for run in (first, second))
    sections = [alone(names[0], mine, other), alone(names[1], other, mine)]
    shared = [domain for domain in mine if domain in other]
    if not shared:
        return Html("".join([*sections, paragraph("The runs share no evaluated domain; losses are not compared.")]))
    both = {domain: (first.sequences.get(domain), second.sequences.get(domain)) for domain in shared}
    if others := [name for name, pair in both.items() if other_text(*pair)]:
        warning = (
            f"The runs were evaluated on other sequences ({', '.join(others)}): another number or length of them, "
            "other text, or another tokenizer; with that, losses per token are not of one kind."
        )
        sections.append(paragraph(warning))
    differences = {domain: difference_of(mine[domain], other[domain], *both[domain]) for domain in shared}
    rows = [difference_row(domain, mine[domain], other[domain], differences[domain]) for domain in shared]
    if len(shared) > 1:
        means = (mean_of([values[domain] for domain in shared]) for values in (mine, other, differences))
        rows.append(difference_row(f"mean of {len(shared)}", *means))
    header = ["domain", *(f"{n} ({c})" for n, c in zip(names, (column, other_column), strict=True))]
    header += ["difference", "beyond 2 standard errors"]
    return Html("".join([*sections, table(header, rows, caption_of(list(both.values())))]))


def alone(name: str, losses: Losses, other: Losses) -> Html:
    """Sentence on domains that only one of the runs was evaluated on; empty if there are none."""
    left = [domain for domain in losses if domain not in other]
    return paragraph(f"Only {name} was evaluated on {', '.join(left)}.") if left else Html("")


def caption_of(both: list[tuple[DomainSequences | None, DomainSequences | None]]) -> str:
    """Caption that explains the errors of the differences."""
    paired = [paired_difference(*pair) is not None for pair in both]
    if all(paired):
        how = "Their errors are those of the differences sequence by sequence"
    elif not any(paired):
        how = "Errors are added as if the held-out texts were drawn anew for each run"
    else:
        how = "Their errors are those of the differences sequence by sequence where both runs read the same text"
    return (
        f"Nats per token with standard errors; difference: the second less the first. {how}; what another seed would "
        "change is not in them."
    )


def difference_of(
    mine: tuple[float, float], other: tuple[float, float], first: DomainSequences | None, second: DomainSequences | None
) -> tuple[float, float]:
    """Difference of two losses and its standard error, paired by sequence if both runs have the same ones."""
    return paired_difference(first, second) or (other[0] - mine[0], math.hypot(mine[1], other[1]))


def difference_row(
    name: str, mine: tuple[float, float], other: tuple[float, float], found: tuple[float, float]
) -> list[str]:
    """Table row: both losses and their difference, each with its standard error."""
    difference, error = found
    shown = with_error(difference, error, sign="+") if math.isfinite(difference) else "-"
    if not math.isfinite(error) or not math.isfinite(difference):
        beyond = "not known"
    elif abs(difference) <= 2 * error:
        beyond = "no"
    else:
        beyond = "yes, lower" if difference < 0 else "yes, higher"
    return [name, loss_cells(mine)[0], loss_cells(other)[0], shown, beyond]


def cost_beside(names: Sequence[str], runs: Sequence[RunRecord]) -> Html:
    """Tokens, FLOPs and time of both runs."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        spent = costs(run)
        flops = sum(cost.flops + cost.teacher_flops for cost in spent)
        hours = sum(cost.seconds for cost in spent) / 3600
        shown = [count(trained_tokens(spent)), "not known" if math.isnan(flops) else f"{flops:.3g}"]
        size = "not known" if run.target is None else count(run.target.parameters())
        rows.append([name, size, *shown, "not known" if math.isnan(hours) else f"{hours:.2f}"])
    caption = "All training phases together; FLOPs with what calibration took."
    return table(["run", "parameters", "tokens", "training FLOPs", "hours"], rows, caption)


def draw_curves(names: Sequence[str], runs: Sequence[RunRecord]) -> Figure | None:
    """Plot mean loss over tokens (left) and training FLOPs (right); None without shared domains."""
    found = [names_in(run.phases, "eval", "loss") for run in runs]
    shared = [domain for domain in found[0] if domain in found[1]]
    if not shared:
        return None
    figure = new_figure(9.2, 4.4, "Held-out loss of both runs", f"mean of {len(shared)} domains, nats per token")
    both = [curves(run, shared) for run in runs]
    for index, (field, label) in enumerate((("tokens", "tokens"), ("flops", "training FLOPs"))):
        axes = panel(figure, 0.75 + 4.35 * index, 0.6, 3.75, 2.9)
        for colour, name, parts in zip(PALETTE, names, both, strict=False):
            for number, part in enumerate(parts):
                style = {"color": colour, **markers(len(part.loss)), "label": name if number == 0 else None}
                axes.plot(getattr(part, field), part.loss, **style)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x < 1e13 else f"{x:.3g}"))
        axes.locator_params(axis="x", nbins=5)
        if index == 0:
            axes.set_ylabel("nats per token")
            axes.legend(frameon=False, loc="upper right", fontsize=8.5)
    return figure
