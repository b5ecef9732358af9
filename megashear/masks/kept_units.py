"""Select the units that the pruned model keeps, and report how decided the masks were.

Kept are the n' largest log-alpha of each row, ties by lower index, in ascending order. They are the units that
`distribution.deterministic` does not set to 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.config.training_schema import PruneConfig
from megashear.masks.constraint import expected_sparsity
from megashear.masks.hard_concrete_masks import SOFT_SLOPE, keep_largest, probability_zero
from megashear.masks.mask_specs import MaskSpec


@dataclass(frozen=True)
class KeptUnits:
    """Kept units as ascending int64 indices into the source; rows exist for every source layer."""

    hidden: Tensor
    """[d']."""
    layer: Tensor
    """[L']."""
    group: Tensor
    """[L, G']: key/value heads of each layer."""
    head: Tensor
    """[L, H']: query heads of each layer, those of one group side by side."""
    intermediate: Tensor
    """[L, I']."""


def kept_indices(log_alpha: Tensor, spec: MaskSpec) -> Tensor:
    """Ascending indices of the kept units: log-alpha's shape, with the last dimension cut to the target's units."""
    kept = keep_largest(log_alpha.detach().reshape(spec.rows, spec.units), spec.target_units)
    return kept.nonzero()[:, 1].view(*spec.shape[:-1], spec.target_units)


def kept_units_of(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec], source: ModelShape) -> KeptUnits:
    """Kept units of the learned granularities; all units of the others.

    Query heads: the kept queries within each kept group, so every kept group has the same number of them.

    Args:
        log_alpha: Granularity -> tensor of its spec's shape.
        specs: Learned granularities.
        source: Shape of the source.

    Returns:
        Kept units, on the CPU.
    """
    kept = {spec.name: kept_indices(log_alpha[spec.name].cpu(), spec) for spec in specs}
    layers, groups, queries = source.num_layers, source.num_query_groups, source.queries_per_group
    group_LG = kept.get("group", torch.arange(groups).expand(layers, -1))
    query_LGQ = kept.get("query", torch.arange(queries).expand(layers, groups, -1))
    of_kept_LGQ = query_LGQ.gather(1, group_LG[:, :, None].expand(-1, -1, query_LGQ.shape[-1]))
    head_LGQ = group_LG[:, :, None] * queries + of_kept_LGQ
    return KeptUnits(
        hidden=kept.get("hidden", torch.arange(source.hidden_size)),
        layer=kept.get("layer", torch.arange(layers)),
        group=group_LG,
        head=head_LGQ.reshape(layers, -1),
        intermediate=kept.get("intermediate", torch.arange(source.intermediate_size).expand(layers, -1)),
    )


OFF_TARGET = 0.01
"""Share of a granularity's units by which expected sparsity may miss its target at the end of pruning."""


@dataclass(frozen=True)
class Borderline:
    """Number of kept units of a granularity whose mask is nearly closed (deterministic value below 0.5)."""

    granularity: str
    kept: int
    below_half: int
    worst: float
    """Smallest deterministic value of a kept unit."""


def kept_rows(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec]) -> dict[str, Tensor]:
    """Rows [R, N] of each learned granularity that remain: those of kept layers, for queries those of kept groups."""
    kept = {
        spec.name: keep_largest(log_alpha[spec.name].detach().reshape(-1, spec.units), spec.target_units)
        for spec in specs
        if spec.name in ("layer", "group")
    }
    found = {}
    for spec in specs:
        rows = log_alpha[spec.name].detach()
        if len(spec.shape) > 1 and "layer" in kept:
            rows = rows[kept["layer"][0]]
        if len(spec.shape) > 2 and "group" in kept:
            groups_LG = kept["group"][kept["layer"][0]] if "layer" in kept else kept["group"]
            rows = rows[groups_LG]
        found[spec.name] = rows.reshape(-1, spec.units)
    return found


def borderline_units(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec]) -> list[Borderline]:
    """Report borderline units per learned granularity, over the remaining rows.

    Under the published limit on log-alpha, a target of one half closes 52 % of the units, and selecting exactly n'
    revives some at a mask value of 0.004. Each of them costs the pruned model more than its mask value suggests.
    """
    reports, rows_by_name = [], kept_rows(log_alpha, specs)
    for spec in specs:
        rows = rows_by_name[spec.name]
        values = torch.sigmoid(SOFT_SLOPE * rows[keep_largest(rows, spec.target_units)])
        reports.append(Borderline(spec.name, values.numel(), int((values < 0.5).sum()), float(values.min())))
    return reports


def describe_undecided(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec], config: PruneConfig) -> list[str]:
    """Problems of masks that are about to be cut, one sentence per granularity; empty if there are none.

    A problem is a remaining row whose expected sparsity is more than OFF_TARGET off its target, or a kept unit whose
    mask is below 0.5. The configuration determines the reason that is given.
    """
    found, rows_by_name = [], kept_rows(log_alpha, specs)
    for spec, borderline in zip(specs, borderline_units(log_alpha, specs), strict=True):
        rows = rows_by_name[spec.name]
        off = expected_sparsity(rows.double()) - spec.target_sparsity
        worst = float(off[off.abs().argmax()])
        if abs(worst) > OFF_TARGET:
            how = "held open by the loss, or slower than" if worst < 0 else "closed beyond"
            where = "" if len(rows) == 1 else f", in the worst of {len(rows)} rows"
            found.append(
                f"{spec.name}: {spec.target_sparsity + worst:.1%} of the units are expected closed{where}, the target "
                f"is {spec.target_sparsity:.1%}: {how} the constraint; the cut to the exact shape costs the more"
            )
        if borderline.below_half:
            found.append(
                f"{spec.name}: {borderline.below_half} of {borderline.kept} kept units have a mask below 0.5: "
                + _why_undecided(spec, config, borderline.below_half / len(rows))
            )
    return found


def _why_undecided(spec: MaskSpec, config: PruneConfig, per_row: float) -> str:
    """Reason why many kept units of a row have a mask below 0.5, and what would decide them."""
    forced = 0.0 if config.constraint == "projected" else forced_units(spec, config.log_alpha_limit)
    if forced >= 0.5 and per_row <= math.ceil(forced):
        return (
            f"prune.log_alpha_limit alone forces some {forced:.0f} of each row's {spec.units} there, since a unit at "
            "the limit is never quite closed; raise the limit, or use prune.constraint: projected"
        )
    return "undecided; more steps, or a higher prune.mask_learning_rate or prune.sharpening, would settle them"


def forced_units(spec: MaskSpec, limit: float | None) -> float:
    """Units of a row that a limit on log-alpha closes beyond those that the target drops.

    When the row's expected sparsity is on its target, a unit at -limit counts as closed by less than 1, and one at
    +limit by more than 0.
    """
    if limit is None:
        return 0.0
    shut, open_ = (float(probability_zero(torch.tensor(value, dtype=torch.float64))) for value in (-limit, limit))
    return max(0.0, ((spec.target_sparsity - open_) / (shut - open_) - spec.target_sparsity) * spec.units)
