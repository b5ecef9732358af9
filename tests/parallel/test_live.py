"""Products over live units give what the full computation gives: loss, gradients of weights and masks, in float64."""

from typing import Any

import pytest

from helpers.ranks import LiveRanks

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


CASES = [  # one for each mechanism
    ("multi-head", {}),
    ("grouped", {"tensor": 2, "sequence": True}),
    ("multi-head", {"pipeline": 2}),
    ("grouped", {"tensor": 4}),  # more ranks than groups
]


def compare(
    ranks: LiveRanks, shape: str, layout: dict[str, Any], patterns: list[tuple[str, int]], **options: Any
) -> None:
    call = {"shape": shape, "parallel": layout, "patterns": patterns, **options}
    found = ranks(world(layout)).call("parallel.live_case:on_against_off", **call)
    assert len(found) == len(patterns)
    for one, (pattern, _) in zip(found, patterns, strict=True):
        check(one, pattern)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_live_units_change_rounding_alone(ranks: LiveRanks, shape: str, layout: dict[str, Any]) -> None:
    compare(ranks, shape, layout, [(pattern, seed) for seed, pattern in enumerate(PATTERNS)])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["multi-head", "grouped"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_live_units_change_rounding_alone_on_more_layouts(ranks: LiveRanks, layout: dict[str, Any], shape: str) -> None:
    compare(ranks, shape, layout, [(pattern, seed) for seed, pattern in enumerate(PATTERNS)])


@pytest.mark.parametrize("option", ["published", "recompute"])
def test_with_an_unmasked_embedding_and_with_recomputation(ranks: LiveRanks, option: str) -> None:
    compare(ranks, "multi-head", {"pipeline": 2}, [("random", 9), ("dead layer", 9)], **{option: True})


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["multi-head tied", "grouped untied", "grouped by 2"])
@pytest.mark.parametrize("layout", [*LAYOUTS, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_random_patterns(ranks: LiveRanks, layout: dict[str, Any], shape: str) -> None:
    compare(ranks, shape, layout, [("random", 100 + seed) for seed in range(20)])
