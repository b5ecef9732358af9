"""Records of a run as arrays, by phase and kind, in the order of steps.

Absent or null values are NaN, so that lines have gaps. Of two records of one step the later one is used. The schema is
in `train/metrics.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PHASES = ("prune", "pretrain")


@dataclass(frozen=True)
class Phase:
    """The records of one phase: kind (train, mask, eval) -> records by ascending step."""

    name: str
    records: Mapping[str, list[dict[str, Any]]]

    def steps(self, kind: str) -> np.ndarray:
        """Steps of the records of a kind, [records], float64."""
        return self.values(kind, "step")

    def values(self, kind: str, *path: str) -> np.ndarray:
        """The number at `path` in every record of a kind, [records], float64, NaN where there is none."""
        numbers = []
        for record in self.records.get(kind, []):
            value: Any = record
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            numbers.append(np.nan if value is None else float(value))
        return np.array(numbers, dtype=np.float64)

    def last_step(self) -> int:
        """The largest step of any record; at least 1."""
        return max([1, *(int(record["step"]) for records in self.records.values() for record in records)])


def phases_of(records: Iterable[Mapping[str, Any]]) -> list[Phase]:
    """The phases that have records, in the order in which a run walks them."""
    by_phase: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for record in records:
        kinds = by_phase.setdefault(record["phase"], {})
        kinds.setdefault(record["kind"], {})[record["step"]] = dict(record)
    order = sorted(by_phase, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
    return [
        Phase(name, {kind: [by_step[s] for s in sorted(by_step)] for kind, by_step in by_phase[name].items()})
        for name in order
    ]


def names_in(phases: Iterable[Phase], kind: str, field: str) -> list[str]:
    """Keys (domains, granularities) that any record of a kind has under `field`, in the order of first appearance."""
    return list(
        dict.fromkeys(name for s in phases for record in s.records.get(kind, []) for name in record.get(field) or {})
    )


def realised_mix(phase: Phase, domains: list[str], intervals: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Share of each domain in the tokens read between evaluations, at most about `intervals` of them.

    Returns the intervals' middle steps, [intervals], and the shares, [domains, intervals], which sum to 1 over domains.
    """
    steps = np.concatenate([[0.0], phase.steps("train")])
    tokens = np.stack([np.concatenate([[0.0], phase.values("train", "domain_tokens", name)]) for name in domains])
    known = ~np.isnan(tokens).all(axis=0)
    steps, tokens = steps[known], np.nan_to_num(tokens[:, known])
    if len(steps) < 2:
        return np.empty(0), np.empty((len(domains), 0))
    inner = phase.steps("eval")
    edges = np.unique(np.concatenate([[0.0], inner[(inner > 0) & (inner < steps[-1])], [steps[-1]]]))
    if len(inner) < 2:
        edges = np.linspace(0.0, steps[-1], min(intervals, len(steps) - 1) + 1)
    read = np.diff(np.stack([np.interp(edges, steps, row) for row in tokens]), axis=1)
    total = read.sum(axis=0)
    chosen = np.flatnonzero(total > 0)[:: max(1, round(len(total) / intervals))]
    return ((edges[:-1] + edges[1:]) / 2)[chosen], read[:, chosen] / total[chosen]
