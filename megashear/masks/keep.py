"""Which units a pruned model keeps, and how sure the masks were of them.

Key properties: the n' largest log-alpha of each row, of equal ones the lower index; indices ascending, so that what is
kept keeps its order. The units are exactly those that `hard_concrete.deterministic` leaves open. Read next: `fold.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config.shape import ModelShape
from megashear.masks.hard_concrete import SOFT_SLOPE, keep_largest
from megashear.masks.lagrangian import expected_sparsity
from megashear.masks.target import MaskSpec


@dataclass(frozen=True)
class KeepSets:
    """Kept units, as ascending int64 indices into the source; rows are given for every source layer."""

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
    """Ascending indices of the kept units: log-alpha's shape with the last dimension cut to the target's units."""
    kept = keep_largest(log_alpha.detach().reshape(spec.rows, spec.units), spec.target_units)
    return kept.nonzero()[:, 1].view(*spec.shape[:-1], spec.target_units)


def keep_sets(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec], source: ModelShape) -> KeepSets:
    """Keep sets of the learned granularities; of the others every unit is kept.

    log_alpha: granularity -> tensor of its spec's shape. Indices are on the CPU. Query heads: within each kept group
    the kept queries, so every kept group has the same number of them.
    """
    kept = {spec.name: kept_indices(log_alpha[spec.name].cpu(), spec) for spec in specs}
    layers, groups, queries = source.num_layers, source.num_query_groups, source.queries_per_group
    group_LG = kept.get("group", torch.arange(groups).expand(layers, -1))
    query_LGQ = kept.get("query", torch.arange(queries).expand(layers, groups, -1))
    of_kept_LGQ = query_LGQ.gather(1, group_LG[:, :, None].expand(-1, -1, query_LGQ.shape[-1]))
    head_LGQ = group_LG[:, :, None] * queries + of_kept_LGQ
    return KeepSets(
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
    """How many kept units of a granularity the masks had nearly closed (deterministic value below a half)."""

    granularity: str
    kept: int
    below_half: int
    worst: float
    """Smallest deterministic value of a kept unit."""


def borderline_units(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec]) -> list[Borderline]:
    """One report per learned granularity, over all rows.

    Under the published limit on log-alpha a target of one half closes 52 % of the units, and the cut to exactly n'
    revives some at 0.004: they are counted here, because each of them costs the pruned model more than its mask says.
    """
    reports = []
    for spec in specs:
        rows = log_alpha[spec.name].detach().reshape(spec.rows, spec.units)
        values = torch.sigmoid(SOFT_SLOPE * rows[keep_largest(rows, spec.target_units)])
        reports.append(Borderline(spec.name, values.numel(), int((values < 0.5).sum()), float(values.min())))
    return reports


def unfinished(log_alpha: Mapping[str, Tensor], specs: Sequence[MaskSpec]) -> list[str]:
    """What is wrong with masks that are to be cut, a sentence for each granularity; nothing where all is well.

    Wrong is a row whose expected sparsity is more than OFF_TARGET off its target, and a kept unit whose mask is below a
    half.
    """
    found = []
    borderline = {one.granularity: one for one in borderline_units(log_alpha, specs)}
    for spec in specs:
        rows = log_alpha[spec.name].detach().reshape(spec.rows, spec.units)
        off = expected_sparsity(rows.double()) - spec.target_sparsity
        worst = float(off[off.abs().argmax()])
        below = borderline[spec.name].below_half
        if abs(worst) > OFF_TARGET:
            how = "held open by the loss, or slower than" if worst < 0 else "closed beyond"
            where = "" if spec.rows == 1 else f", in the worst of {spec.rows} rows"
            found.append(
                f"{spec.name}: {spec.target_sparsity + worst:.1%} of the units are expected closed{where}, the target "
                f"is {spec.target_sparsity:.1%}: {how} the constraint; the cut to the exact shape costs the more"
            )
        if below:
            found.append(
                f"{spec.name}: {below} of {borderline[spec.name].kept} kept units have a mask below 0.5: undecided; "
                "more steps, or a higher prune.mask_learning_rate or prune.sharpening, would settle them"
            )
    return found
