"""A step with a teacher equals the single process's under every layout: loss, KL, gradients, weights.

The teacher is larger than the student in pre-training, of its shape in pruning, and has as many pipeline stages.
Tolerances are those of `test_step.py`. More layouts and shapes: `pytest tests/parallel/test_distillation.py -m slow`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from helpers.budget import slow
from helpers.ranks import Ranks
from parallel.test_step import ROUNDING, SCALAR, close_all

HOW = {"weight": 0.6, "temperature": 1.5, "chunk": 10}
PRUNE, PRETRAIN = True, False
LAYOUTS = [
    ("multi-head", PRUNE, {"tensor": 2, "sequence": True}),
    ("multi-head tied", PRETRAIN, {"pipeline": 2, "virtual_pipeline": 2}),
    ("multi-head", PRUNE, {"data": 2}),
    ("multi-head", PRETRAIN, {"tensor": 2, "pipeline": 2}),
    *slow(
        ("multi-head", PRETRAIN, {"tensor": 4, "sequence": True}),
        ("multi-head", PRETRAIN, {"pipeline": 4}),
        ("multi-head", PRUNE, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}),
        ("multi-head", PRUNE, {"tensor": 2, "data": 2}),
        ("multi-head tied", PRETRAIN, {"pipeline": 2, "data": 2}),
    ),
]
SLOW_LAYOUTS = [
    (shape, prunes, sizes)
    for shape in ("multi-head", "multi-head tied", "grouped", "grouped untied", "grouped by 2")
    for prunes in (PRUNE, PRETRAIN)
    for sizes in (
        {"tensor": 2},
        {"tensor": 4},
        {"tensor": 3, "sequence": True},
        {"pipeline": 2},
        {"pipeline": 3},
        {"data": 4},
        {"tensor": 2, "pipeline": 2, "sequence": True},
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
        {"tensor": 2, "data": 2, "sequence": True},
        {"pipeline": 2, "data": 2},
    )
    # 2 groups and 3 ranks, 6 groups and 4: neither divides.
    if (sizes.get("tensor"), shape) not in {(3, "grouped"), (3, "grouped untied"), (4, "grouped by 2")}
]


@pytest.fixture(scope="module")
def single(ranks: Callable[[int], Ranks]) -> Callable[[str, bool], dict[str, Any]]:
    """The single process's step."""
    return cache(lambda shape, prunes: taught(ranks, shape, prunes, {}))


def taught(
    ranks: Callable[[int], Ranks], shape: str, prunes: bool, sizes: dict[str, Any], how: dict[str, Any] = HOW
) -> dict[str, Any]:
    sizes = dict(sizes)
    world = sizes.pop("data", 1) * sizes.get("tensor", 1) * sizes.get("pipeline", 1)
    arguments = {"shape": shape, "parallel": sizes, "prunes": prunes, "how": how}
    return ranks(world).call("parallel.distillation_case:taught_step", **arguments)


def names(case: tuple[str, bool, dict[str, Any]]) -> str:
    return f"{case[0]} {'prune' if case[1] else 'pretrain'} {case[2]}"


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert not found["skipped"] and not wanted["skipped"]
    for name in ("loss", "distillation", "teacher loss", "gradient norm"):
        assert found[name] == pytest.approx(wanted[name], rel=SCALAR), name
    close_all(found["gradients"], wanted["gradients"], "gradient of")
    close_all(found["weights"], wanted["weights"], "weight", rounding=2 * ROUNDING)


@pytest.mark.parametrize("case", LAYOUTS, ids=names)
def test_a_taught_step_equals_the_single_process(ranks, single, case) -> None:
    wanted = single(*case[:2])
    assert wanted["distillation"] > 0.1, "the teacher must differ from the student"
    check(taught(ranks, *case), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_LAYOUTS, ids=names)
def test_a_taught_step_equals_the_single_process_on_more_layouts(ranks, single, case) -> None:
    check(taught(ranks, *case), single(*case[:2]))


def test_the_chunk_is_no_part_of_the_result(ranks, single) -> None:
    """More than the micro-batch has, one token, and some that do not divide: to the rounding of products."""
    for chunk in (1, 1000):
        check(taught(ranks, "multi-head", PRETRAIN, {}, HOW | {"chunk": chunk}), single("multi-head", PRETRAIN))


@pytest.mark.parametrize(("world", "temperature"), [(2, 3.0), (4, 1.0)])
def test_a_vocabulary_in_parts(ranks, world: int, temperature: float) -> None:
    """Of which some are padding alone; every rank has the same losses, bit for bit."""
    how = {"weight": 0.4, "temperature": temperature, "chunk": 8}
    found = ranks(world).call("parallel.distillation_case:parts_of_a_vocabulary", how=how)
    torch.testing.assert_close(found["losses"], found["losses alone"], rtol=1e-6, atol=1e-6 * temperature**2)
    torch.testing.assert_close(found["gradient"][:, :101], found["gradient alone"][:, :101], rtol=1e-6, atol=1e-6)
    assert not found["gradient"][:, 101:].any()
