"""Write the HTML report of a run (`megashear report RUN [OTHER]`).

An unfinished run, one that only pre-trains, or one without masks gets a shorter report.
"""

import math
from itertools import chain
from pathlib import Path

import matplotlib

from megashear.errors import DataError
from megashear.evaluation.losses import loss_cells, mean_of
from megashear.files.atomic import write_text
from megashear.planning.text_table import count, duration
from megashear.plots.plot_style import STYLE
from megashear.plots.run_plots import draw_pictures
from megashear.plots.score_plots import importance_picture
from megashear.report.compare_runs import comparison
from megashear.report.html_page import Html, bullets, page, paragraph, picture, section, table
from megashear.report.kept_section import kept
from megashear.report.run_cost import costs, trained_tokens
from megashear.report.run_record import RunRecord, read_run

NAME = "report.html"
CAPTIONS = {
    "weights": "The weight of each domain after every evaluation, and the share of it in what was then read.",
    "epochs": "How often each domain's training data has been read.",
    "losses": "Held-out loss of each domain at every evaluation, beside the reference that drives its weight.",
    "sparsity": "The share of units that the masks close, as expected and as the schedule asks for.",
    "multipliers": "The multipliers that draw expected sparsity to its target.",
    "speed": "What closing masks saves: live FLOPs and the time of a step.",
    "training": "Training loss and tokens per second at every progress line.",
    "masks": "What the masks keep: layers, heads, the share of intermediate units in each layer, hidden units.",
    "importance": "The scores that masks started from, or that units were kept by: higher is kept, within each row.",
}


def write_report(folder: Path, other: Path | None = None, output: Path | None = None) -> Path:
    """Write the report of a run, compared with a second one if given; returns the file.

    Args:
        run: Run folder.
        other: Run folder to compare with.
        output: File; None: `report.html` in the run folder.

    Raises:
        DataError: A folder is not that of a run, or its records are damaged.
        StorageError: The file cannot be written.
    """
    run = read_run(folder)
    second = read_run(other) if other is not None else None
    output = Path(output) if output is not None else Path(folder) / NAME
    try:
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            text = render(run, second)
    except (KeyError, TypeError, ValueError) as error:
        named = folder if other is None else f"{folder} or {other}"
        raise DataError(f"{named}: a record that is not one of a run ({error!r}); restore the file") from error
    write_text(output, text)
    return output


def render(run: RunRecord, second: RunRecord | None = None) -> str:
    """The page as text; the caller sets the style of the plots."""
    parts = [headline(run)]
    if run.missing:
        parts.append(section("What is missing", [bullets(run.missing)]))
    for made in (losses, kept, cost, mixture, pictures):
        parts += made(run)
    if second is not None:
        parts.append(comparison(run, second))
    return page(f"megashear: {run.name}", parts)


def headline(run: RunRecord) -> Html:
    """Section on source and result: parameters and shapes."""
    if run.target is None:
        return paragraph("The shape of this run's model is not known.")
    size = count(run.target.parameters())
    shapes = {"source": run.source, "target": run.target} if run.sheared else {"model": run.target}
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    if not run.sheared:
        text = f"A model of {size} parameters, trained in its own shape."
    elif run.source is None:
        text = f"A model of {size} parameters, pruned from a source of unknown shape."
    else:
        share = run.target.parameters() / run.source.parameters()
        text = f"{count(run.source.parameters())} parameters pruned to {size} ({share:.1%})."
    fields = {
        "hidden size": "hidden_size",
        "layers": "num_layers",
        "query heads": "num_heads",
        "key/value heads": "num_query_groups",
        "intermediate size": "intermediate_size",
        "vocabulary": "vocab_size",
    }
    rows = [[name, *(f"{getattr(shape, key):,}" for shape in shapes.values())] for name, key in fields.items()]
    rows.append(["parameters", *(f"{shape.parameters():,}" for shape in shapes.values())])
    return Html(paragraph(text) + table(["", *shapes], rows))


def losses(run: RunRecord) -> list[Html]:
    """Section on held-out losses of every model of the run."""
    columns = run.losses
    if not columns:
        return []
    domains = list(dict.fromkeys(domain for column in columns.values() for domain in column))
    rows = [[d, *(cell for column in columns.values() for cell in loss_cells(column.get(d)))] for d in domains]
    shared = [domain for domain in domains if all(domain in column for column in columns.values())]
    if len(shared) > 1:
        means = [mean_of([column[domain] for domain in shared]) for column in columns.values()]
        rows.append([f"mean of {len(shared)}", *(cell for mean in means for cell in loss_cells(mean))])
    header = ["domain", *(text for name in columns for text in (name, "perplexity"))]
    caption = "Nats per token with the standard error of the evaluation, and perplexity, on held-out text."
    return [section("Held-out losses", [table(header, rows, caption)])]


def cost(run: RunRecord) -> list[Html]:
    """Section on tokens, FLOPs and time by phase."""
    found = costs(run)
    if not found:
        return []
    rows = []
    for one in found:
        evaluation = one.evaluation_seconds / one.seconds if one.seconds else math.nan
        live = "-" if one.phase != "prune" else "not measured" if math.isnan(one.live) else f"{one.live:.1%}"
        others = (one.teacher_flops, one.source_flops)
        cells = [number(one.flops), *(number(flops) if flops else "-" for flops in others)]
        time = "not known" if math.isnan(one.seconds) else duration(one.seconds) if one.seconds else "-"
        share = "-" if not one.seconds else "not known" if math.isnan(evaluation) else f"{evaluation:.1%}"
        rows.append([one.phase, count(one.tokens), live, *cells, time, share])
    sums = [sum(getattr(one, key) for one in found) for key in ("flops", "teacher_flops", "source_flops")]
    seconds = sum(one.seconds for one in found)
    time = "not known" if math.isnan(seconds) else duration(seconds)
    cells = [number(sums[0]), number(sums[1]) if sums[1] else "-", number(sums[2])]
    rows.append(["all", count(trained_tokens(found)), "", *cells, time, ""])
    header = ["phase", "tokens", "live share", "training FLOPs", "teacher FLOPs", "the source on these tokens"]
    caption = (
        "FLOPs of products, forward and backward: 6 per weight and token, causal attention counted half. Live share: "
        "the mean share of the source's FLOPs that units with an open mask needed. Teacher: its forward pass, a third "
        "of a training step of the source. Calibration: the tokens that basis, scores and least squares read, by which "
        "no step is taken; its time is known once pruning is done. Held-out evaluation is in the time and not in the "
        "FLOPs."
    )
    return [section("Cost", [table([*header, "time (h:mm)", "of it evaluation"], rows, caption)])]


def number(value: float) -> str:
    """FLOPs with three digits."""
    return "not known" if math.isnan(value) else f"{value:.3g}"


def mixture(run: RunRecord) -> list[Html]:
    """Section on domain weights and epochs."""
    columns: dict[str, dict[str, float]] = {}
    for phase in run.phases:
        evaluated, trained = phase.records.get("eval", []), phase.records.get("train", [])
        first: dict[str, float] = next((record["weights"] for record in evaluated if record.get("weights")), {})
        last = run.done.get(phase.name, {}).get("weights") or (evaluated[-1].get("weights") if evaluated else {})
        epochs = run.done.get(phase.name, {}).get("epochs") or (trained[-1].get("domain_epochs") if trained else {})
        columns |= {f"{phase.name}, first weight": first, f"{phase.name}, last weight": last or {}}
        columns[f"{phase.name}, epochs"] = epochs or {}
    columns = {name: values for name, values in columns.items() if values}
    domains = list(dict.fromkeys(domain for values in columns.values() for domain in values))
    if not domains:
        return []
    rows = [
        [
            d,
            *(
                ("-" if d not in v else f"{v[d]:.4f}" if n.endswith("epochs") else f"{v[d]:.2%}")
                for n, v in columns.items()
            ),
        ]
        for d in domains
    ]
    caption = "First weight: after the first evaluation of the phase. Epochs: of a domain's training data, so far."
    return [section("Mixture", [table(["domain", *columns], rows, caption)])]


def pictures(run: RunRecord) -> list[Html]:
    """Section with the plots of `megashear plot`."""
    figures = chain(draw_pictures(run.phases, run.masks), importance_picture(run.folder))
    drawn = [picture(figure, CAPTIONS[name]) for name, figure in figures]
    return [section("Pictures", drawn)] if drawn else []
