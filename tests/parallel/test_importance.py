"""Scores under every layout equal a single process's to 1e-5, by every criterion that reads text.

Tolerances are relative to the largest score of a granularity. Errors are differences between batches, of which rounding
is a larger part. More layouts and shapes: `bash tests/run.sh --slow`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from helpers.budget import slow
from helpers.ranks import Ranks
from helpers.tiny import Tiny
from parallel.test_step import GQA, MHA, Case

SCORE, ERROR = 1e-5, 1e-4

CASES = [
    Case(GQA, tensor=2, sequence=True),
    Case(GQA, pipeline=2, virtual_pipeline=2, layers=5),
    Case(MHA, data=2),
    pytest.param(Case(GQA, tensor=4), marks=pytest.mark.expensive("four ranks, more than groups")),
    *slow(
        Case(MHA, tensor=2),
        Case(GQA, tensor=2, pipeline=2, sequence=True),
        Case(MHA, pipeline=2, data=2),
    ),
]
PRODUCTS = [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
PRODUCTS += [(3, 1, 1), (1, 3, 1), (1, 1, 3)]
SLOW_CASES = [
    Case(shape, tensor=tensor, pipeline=pipeline, data=data, sequence=sequence, layers=5, micro=6 if data == 3 else 4)
    for shape in ("multi-head tied", "grouped", "grouped untied", "grouped by 2")
    for tensor, pipeline, data in PRODUCTS
    for sequence in ((False, True) if tensor > 1 else (False,))
    # 2 groups and 3 ranks, 6 groups and 4: neither divides.
    if (tensor, shape) not in {(3, "grouped"), (3, "grouped untied"), (4, "grouped by 2")}
]


@pytest.fixture(scope="module")
def single(ranks: Callable[[int], Ranks], tiny: Tiny) -> Callable[[str, int, int], dict[str, Any]]:
    """The single process's scores for (shape, layers, sequences of a batch)."""

    @cache
    def scores(shape: str, layers: int, sequences: int) -> dict[str, Any]:
        arguments = {"data": str(tiny.data), "shape": shape, "layers": layers, "sequences": sequences}
        return ranks(1).call("parallel.importance_case:score", parallel={}, **arguments)

    return scores


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_equal_the_single_process_s(ranks, single, tiny: Tiny, case: Case) -> None:
    check(ranks, single, tiny, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_scores_equal_the_single_process_s_on_more_layouts(ranks, single, tiny: Tiny, case: Case) -> None:
    check(ranks, single, tiny, case)


@pytest.mark.parametrize("case", [Case(GQA)], ids=str)
def test_recomputed_activations_change_no_bit(ranks, single, tiny: Tiny, case: Case) -> None:
    found = score(ranks, tiny, case, recompute=True)
    for run, wanted in single(case.shape, case.layers, case.micro).items():
        for name, value in wanted["units"].items():
            assert torch.equal(found[run]["units"][name], value), f"{run} {name}"


@pytest.mark.parametrize(
    "case",
    [
        Case(GQA, tensor=2, sequence=True),
        Case(GQA, pipeline=2, virtual_pipeline=2, layers=5),
        *slow(Case(GQA, tensor=2), Case(MHA, pipeline=2, data=2)),
    ],
    ids=str,
)
def test_the_residual_stream_s_moments_equal_the_single_process_s(ranks, tiny: Tiny, case: Case) -> None:
    arguments = {"data": str(tiny.data), "shape": case.shape, "layers": case.layers, "sequences": case.micro}
    called = "parallel.importance_case:residual_moments"
    found = ranks(case.world).call(called, parallel=case.parallel(), **arguments)
    wanted = ranks(1).call(called, parallel={}, **arguments)
    for name, value in wanted.items():
        close(found[name], value, 1e-6, name)


def score(ranks, tiny: Tiny, case: Case, **options: Any) -> dict[str, Any]:
    arguments = {"data": str(tiny.data), "shape": case.shape, "layers": case.layers, "sequences": case.micro}
    arguments["parallel"] = case.parallel()
    return ranks(case.world).call("parallel.importance_case:score", **arguments, **options)


def check(ranks, single, tiny: Tiny, case: Case) -> None:
    found, wanted = score(ranks, tiny, case), single(case.shape, case.layers, case.micro)
    assert found.keys() == wanted.keys()
    for run, one in wanted.items():
        other = found[run]
        assert other["samples"] == one["samples"]
        assert other["units"].keys() == one["units"].keys()
        for name, value in one["units"].items():
            close(other["units"][name], value, SCORE, f"{run} {name}")
            close(other["errors"][name], one["errors"][name], ERROR, f"error of {run} {name}")
            for domain, units in one["domains"].items():
                close(other["domains"][domain][name], units[name], SCORE, f"{run} {name} on {domain}")


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    assert wanted.abs().max() > 0, f"{what}: nothing to compare"
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    assert worst <= tolerance, f"{what}: {worst:.1e} of its largest apart"
