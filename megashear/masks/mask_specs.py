"""Specification of each learned granularity, from source and target shape.

Granularities have fixed indices, which enter the mask noise, so learning fewer of them does not change the noise of the
others. A group is a key/value head with its query heads; under multi-head attention it is a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megashear.config.model_shape import ModelShape
from megashear.config.shape_legality import granularity_problems, granularity_sizes
from megashear.config.training_schema import GRANULARITIES
from megashear.errors import ConfigError


@dataclass(frozen=True)
class MaskSpec:
    """A learned granularity: its log-alpha has `shape`, whose last dimension is the units of a row."""

    name: str
    shape: tuple[int, ...]
    target_units: int
    """Units of each row that the target keeps."""

    @property
    def index(self) -> int:
        """Fixed index of the granularity, a coordinate of its noise."""
        return GRANULARITIES.index(self.name)

    @property
    def rows(self) -> int:
        """Rows that have a constraint of their own."""
        return math.prod(self.shape[:-1])

    @property
    def units(self) -> int:
        """Units in a row."""
        return self.shape[-1]

    @property
    def zeros_per_row(self) -> int:
        """Units of each row that the target drops."""
        return self.units - self.target_units

    @property
    def target_sparsity(self) -> float:
        """Share of each row that the target drops."""
        return 1.0 - self.target_units / self.units


def mask_specs(source: ModelShape, target: ModelShape, granularities: Sequence[str] | None = None) -> list[MaskSpec]:
    """Specs of the learned granularities in their fixed order; None learns those in which the target is smaller.

    Raises:
        ConfigError: Unknown names, `query` under multi-head attention, or a shrinking granularity that is not learned.
    """
    problems = granularity_problems(source, target, granularities)
    if problems:
        raise ConfigError(problems)
    layers, groups = source.num_layers, source.num_query_groups
    rows = {
        "hidden": (),
        "group": (layers,),
        "query": (layers, groups),
        "intermediate": (layers,),
        "layer": (),
    }
    specs = []
    for name, (units, target_units) in granularity_sizes(source, target).items():
        if name in granularities if granularities is not None else target_units < units:
            specs.append(MaskSpec(name, (*rows[name], units), target_units))
    return specs
