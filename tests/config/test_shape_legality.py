"""Shape legality: one message per problem, with the key to change and legal values."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PRESETS
from megashear.config.schema import ParallelConfig
from megashear.config.shape_legality import granularity_sizes, shape_problems

LLAMA2, LLAMA3, SMOL = PRESETS["llama2-7b"], PRESETS["llama3-8b"], PRESETS["smollm2-135m"]
SOURCE = ModelShape(64, 4, 8, 4, 8, 96, 128)
TARGET = ModelShape(32, 2, 4, 2, 8, 48, 128)


def problems(target=TARGET, source=SOURCE, world_size=None, **parallel):
    return shape_problems(source, target, ParallelConfig(**parallel), world_size)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(
    ("source", "target"),
    [(LLAMA2, "sheared-2.7b"), (LLAMA2, "sheared-1.3b"), (LLAMA3, "llama3-4b"), (LLAMA3, None)],
    ids=["2.7b", "1.3b", "4b", "no-target"],
)
def test_published_targets_are_legal(source, target, tensor):
    target = PRESETS[target] if target else None
    assert problems(target, source, tensor=tensor, pipeline=2, virtual_pipeline=4, world_size=8 * tensor) == []


@pytest.mark.parametrize(
    ("target", "parallel", "starts", "hint"),
    [
        ({"hidden_size": 31}, {"tensor": 2}, "target.hidden_size: 31 ", "use 30 or 32"),
        ({"num_heads": 2}, {"tensor": 4}, "target.num_heads: 2 ", "use 4"),
        ({"intermediate_size": 50}, {"tensor": 4}, "target.intermediate_size: 50 ", "use 48 or 52"),
        (
            {"num_query_groups": 3, "num_heads": 6},
            {"tensor": 2},
            "target.num_query_groups: 3 ",
            "use 2 with num_heads 4 or 4 with num_heads 8",
        ),
        ({"num_layers": 2}, {"pipeline": 2, "virtual_pipeline": 2}, "target.num_layers: 2 ", "at least 4 layers"),
        ({"hidden_size": 65}, {}, "target.hidden_size: 65 is more", "use 64 or less"),
        ({"num_layers": 5}, {}, "target.num_layers: 5 is more", "use 4 or less"),
        ({"num_query_groups": 1}, {}, "target.num_query_groups: 4 heads in 1 groups", "use 2 or 4"),
        ({"num_heads": 5}, {}, "target.num_query_groups: 2 groups", "use 1 or 5"),
        ({"head_dim": 4}, {}, "target.head_dim: 4 differs from the source's 8", "unset it"),
        ({"vocab_size": 64}, {}, "target.vocab_size: 64 differs", "unset it"),
        ({"tie_word_embeddings": True}, {}, "target.tie_word_embeddings: True differs", "unset it"),
        ({"rope_theta": 2.0}, {}, "target.rope_theta: 2.0 differs", "unset it"),
        ({"norm_eps": 1.0}, {}, "target.norm_eps: 1.0 differs", "unset it"),
        ({"hidden_size": 0}, {}, "target.hidden_size: 0 is not a size", "use 1 or more"),
        ({}, {"sequence": True}, "parallel.sequence: ", "parallel.tensor to 2"),
        ({}, {"virtual_pipeline": 2}, "parallel.virtual_pipeline: 2 ", "pipeline to 2"),
        ({}, {"tensor": 0}, "parallel.tensor: 0 is not a size", "use 1 or more"),
        ({}, {"tensor": 2, "world_size": 7}, "parallel.world_size: 7 ranks", "launch 6 or 8 ranks"),
        ({}, {"tensor": 2, "world_size": 1}, "parallel.world_size: 1 ranks", "launch 2 ranks"),
    ],
    ids=[
        "hidden-not-divisible",
        "heads-not-divisible",
        "intermediate-not-divisible",
        "groups-neither-multiple-nor-divisor",
        "fewer-layers-than-stages",
        "hidden-above-source",
        "layers-above-source",
        "heads-per-group-above-source",
        "groups-do-not-divide-heads",
        "head-dim",
        "vocab-size",
        "tied-embeddings",
        "rope-theta",
        "norm-eps",
        "hidden-zero",
        "sequence-without-tensor",
        "virtual-without-pipeline",
        "tensor-zero",
        "world-size-not-divisible",
        "world-size-too-small",
    ],
)
def test_each_problem_names_its_key_and_legal_values(target, parallel, starts, hint):
    world = parallel.pop("world_size", None)
    found = problems(dataclasses.replace(TARGET, **target), world_size=world, **parallel)
    assert len(found) == 1, found
    assert found[0].startswith(starts) and hint in found[0], found[0]


def test_unshardable_source_asks_for_another_layout():
    found = problems(None, SMOL, tensor=2)
    assert found == [
        "parallel.tensor: the source's num_heads 9 cannot be split over 2 ranks; use 1 or 3",
        "parallel.tensor: the source's num_query_groups 3 cannot be split over 2 ranks; use 1 or 3",
    ]
    assert "use at most 30 stages" in problems(None, SMOL, pipeline=16, virtual_pipeline=2)[0]


def test_fewer_groups_than_tensor_ranks_are_legal():
    one_group = dataclasses.replace(SOURCE, num_query_groups=2)
    assert problems(dataclasses.replace(TARGET, num_query_groups=1), one_group, tensor=4) == []


def test_sizes_below_one_are_reported_first():
    found = problems(dataclasses.replace(TARGET, num_query_groups=0, num_heads=-2), tensor=0)
    assert [text.split(":")[0] for text in found] == [
        "parallel.tensor", "target.num_heads", "target.num_query_groups"
    ]  # fmt: skip


def test_all_problems_are_reported_together():
    target = ModelShape(65, 5, 7, 3, 8, 50, 100)
    found = problems(target, tensor=4, world_size=6, sequence=True)
    keys = {text.split(":")[0] for text in found}
    assert keys == {
        "parallel.world_size", "target.hidden_size", "target.num_layers", "target.num_heads",
        "target.num_query_groups", "target.intermediate_size", "target.vocab_size",
    }  # fmt: skip


@given(
    st.tuples(st.integers(1, 70), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 100)),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_no_problems_iff_every_condition_holds(sizes, tensor, pipeline):
    hidden, layers, heads, groups, intermediate = sizes
    target = ModelShape(hidden, layers, heads, groups, 8, intermediate, 128)
    legal = (
        all(size % tensor == 0 for size in (hidden, heads, intermediate, 64, 8, 96))
        and all(g % tensor == 0 or tensor % g == 0 for g in (groups, 4))
        and heads % groups == 0
        and heads // groups <= 2
        and hidden <= 64 and pipeline <= layers <= 4 and heads <= 8 and groups <= 4 and intermediate <= 96
        and layers > 0
        and hidden % heads == 0
    )  # fmt: skip
    assert (problems(target, tensor=tensor, pipeline=pipeline) == []) == legal


def test_query_granularity_needs_grouped_queries():
    assert granularity_sizes(SOURCE, TARGET) == {
        "hidden": (64, 32), "group": (4, 2), "query": (2, 2), "intermediate": (96, 48), "layer": (4, 2)
    }  # fmt: skip
    assert "query" not in granularity_sizes(LLAMA2, PRESETS["sheared-1.3b"])
