"""Report section on the kept units: how they were chosen, counts by granularity and layer, and maps."""

import numpy as np

from megashear.plots.mask_plots import draw_maps
from megashear.report.html_page import Html, paragraph, picture, section, table
from megashear.report.run_record import RunRecord


def kept(run: RunRecord) -> list[Html]:
    """Section on the kept units, by granularity and by layer."""
    parts: list[Html] = []
    pruned = run.done.get("prune", {})
    if pruned.get("method") == "one_shot":
        criteria = ", ".join(f"{name} by {criterion}" for name, criterion in pruned["criteria"].items())
        parts.append(paragraph(f"Chosen at once: {criteria}; nothing was trained before the cut."))
    if pruned.get("principal"):
        parts.append(paragraph("Hidden units are principal directions of the source's residual stream."))
    if pruned.get("refit"):
        parts.append(paragraph("Output matrices of what was kept were fitted to the source by least squares."))
    if pruned.get("undecided"):
        parts.append(paragraph(f"Undecided when masks were frozen: {'; '.join(pruned['undecided'])}."))
    if rows := granularities(run):
        caption = (
            "Open: masks that are not exactly 0, at the cut or, before it, at the last evaluation; what stands in a "
            "layer that goes is not open. Borderline: units that the cut keeps although their mask is below one half; "
            "lowest: the least mask among the kept. A group is the query heads that share a key/value head."
        )
        header = ["granularity", "open", "kept by the cut", "borderline", "lowest"]
        parts.append(table(header, rows, caption))
    grids: dict[str, np.ndarray] = {name: run.masks[name] for name in ("head", "intermediate") if name in run.masks}
    if grids or "layer" in run.masks:
        parts.append(by_layer(run, grids))
    figure = draw_maps(run.masks)
    if figure is not None:
        caption = "Layers by heads and layers by intermediate units, at the cut or at the last evaluation before."
        parts.append(picture(figure, caption))
    return [section("What was kept", parts)] if parts else []


def granularities(run: RunRecord) -> list[list[str]]:
    """Row per granularity that has masks or was pruned: open, kept, borderline, lowest."""
    finalized = run.done.get("finalize", {})
    near = {one.get("granularity"): one for one in finalized.get("borderline", [])}
    cut = finalized.get("kept", {})
    rows = []
    for name in dict.fromkeys([*run.masks, *cut, *near]):
        mask, sure = run.masks.get(name), near.get(name)
        shown = ["-"] if mask is None else [f"{np.count_nonzero(mask):,} of {mask.size:,}"]
        shown.append(f"{cut[name]:,}" if name in cut else "-")
        shown += ["-", "-"] if sure is None else [f"{sure['below_half']:,}", f"{sure['worst']:.3f}"]
        rows.append([str(name), *shown])
    return rows


def by_layer(run: RunRecord, grids: dict[str, np.ndarray]) -> Html:
    """Open units of every layer; blank if the layer is dropped."""
    layer = run.masks.get("layer")
    number = len(layer) if layer is not None else len(next(iter(grids.values())))
    header = ["layer", *(["mask of the layer"] if layer is not None else []), *(f"open, {name}" for name in grids)]
    rows = []
    for row in range(number):
        gone = layer is not None and not layer[row]
        cells = [] if layer is None else ["pruned" if gone else f"{layer[row]:.3f}"]
        cells += ["-" if gone else f"{np.count_nonzero(mask[row]):,} of {mask.shape[1]:,}" for mask in grids.values()]
        rows.append([str(row), *cells])
    return table(header, rows, "Open units of each layer, at the cut or at the last evaluation before.")
