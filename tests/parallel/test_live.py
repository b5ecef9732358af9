"""Products over live units give what the full computation gives: loss, gradients of weights and masks, in float64."""

from typing import Any

import pytest

PATTERNS = ["random", "all alive", "dead layer", "dead stack", "one head", "half of each group", "dead branches"]
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"tensor": 2, "pipeline": 2, "sequence": True},
]


def check(found: dict[str, Any], pattern: str) -> None:
    assert found["loss"] > 1.0
    assert found["left out"] == (pattern != "all alive"), "the pattern does not test what it should"
    assert found["worst"]["loss"] <= 1e-10
    assert found["worst"]["weights"] <= 1e-9
    assert found["worst"]["masks"] <= 1e-9


def world(layout: dict[str, Any]) -> int:
    return layout.get("tensor", 1) * layout.get("pipeline", 1)


@pytest.mark.parametrize("shape", ["multi-head", "grouped"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_live_units_change_rounding_alone(ranks, layout: dict[str, Any], shape: str) -> None:
    for seed, pattern in enumerate(PATTERNS):
        call = {"shape": shape, "parallel": layout, "pattern": pattern, "seed": seed}
        check(ranks(world(layout)).call("parallel.live_case:on_against_off", **call), pattern)


def test_more_tensor_parallel_ranks_than_groups(ranks) -> None:
    for seed, pattern in enumerate(PATTERNS):
        call = {"shape": "grouped", "parallel": {"tensor": 4}, "pattern": pattern, "seed": seed}
        check(ranks(4).call("parallel.live_case:on_against_off", **call), pattern)


@pytest.mark.parametrize("option", ["published", "recompute"])
def test_with_an_unmasked_embedding_and_with_recomputation(ranks, option: str) -> None:
    for pattern in ("random", "dead layer"):
        call = {"shape": "multi-head", "parallel": {"pipeline": 2}, "pattern": pattern, "seed": 9, option: True}
        check(ranks(2).call("parallel.live_case:on_against_off", **call), pattern)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["multi-head tied", "grouped untied", "grouped by 2"])
@pytest.mark.parametrize("layout", [*LAYOUTS, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_random_patterns(ranks, layout: dict[str, Any], shape: str) -> None:
    for seed in range(20):
        call = {"shape": shape, "parallel": layout, "pattern": "random", "seed": 100 + seed}
        check(ranks(world(layout)).call("parallel.live_case:on_against_off", **call), "random")
