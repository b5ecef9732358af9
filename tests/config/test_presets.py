"""Named shapes, and the resolution of keys, preset and source to a shape."""

import dataclasses

import pytest

from megashear.config.model_shape import ModelShape, RopeScaling
from megashear.config.presets import PRESETS, preset, resolve_shape
from megashear.config.schema import ShapeConfig
from megashear.errors import ConfigError

PUBLISHED_PARAMETERS = {
    "llama2-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "sheared-2.7b": 2_701_560_320,
    "sheared-1.3b": 1_345_423_360,
    "llama3.1-70b": 70_553_706_496,
    "llama3-8b": 8_030_261_248,
    "llama3.2-3b": 3_212_749_824,
    "llama3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
}


def problems_of(*arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        resolve_shape(*arguments, **keywords)
    return caught.value.problems


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_presets_have_published_parameter_counts(name):
    assert PRESETS[name].parameters() == PUBLISHED_PARAMETERS[name]
    assert resolve_shape(ShapeConfig(preset=name), None) == PRESETS[name]


def test_4b_target_has_4_billion_parameters():
    shape = PRESETS["llama3-4b"]
    assert shape.parameters() == pytest.approx(4.0e9, rel=0.01)
    assert (shape.head_dim, shape.num_query_groups, shape.queries_per_group) == (128, 8, 3)


def test_unknown_preset_suggests_near_names():
    with pytest.raises(ConfigError, match=r"'llama2-7B'; did you mean llama2-7b"):
        preset("llama2-7B")
    with pytest.raises(ConfigError, match="there are llama2-13b, llama2-7b"):
        preset("gpt")
    assert problems_of(ShapeConfig(preset="sheared-1.3"), PRESETS["llama2-7b"])[0].startswith("target.preset: ")
    assert problems_of(ShapeConfig(preset="sheared-1.3"), None)[0].startswith("source.shape.preset: ")


def test_target_takes_only_sizes_from_preset():
    source = dataclasses.replace(
        PRESETS["llama2-7b"], vocab_size=1000, tie_word_embeddings=True, rope_theta=5.0, rope_scaling=RopeScaling()
    )
    ours = resolve_shape(ShapeConfig(preset="sheared-1.3b", num_layers=20), source)
    pruned = ("hidden_size", "num_heads", "num_query_groups", "intermediate_size")
    sizes = {key: getattr(PRESETS["sheared-1.3b"], key) for key in pruned}
    assert ours == dataclasses.replace(source, num_layers=20, **sizes)


def test_target_inherits_unset_keys_from_source():
    source = PRESETS["smollm2-135m"]
    assert resolve_shape(ShapeConfig(), source) == source
    assert resolve_shape(ShapeConfig(hidden_size=384), source) == dataclasses.replace(source, hidden_size=384)
    context = resolve_shape(ShapeConfig(max_position_embeddings=64, norm_eps=1e-6), source)
    assert (context.max_position_embeddings, context.norm_eps) == (64, 1e-6)


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        ({"num_heads": 24}, 6),  # 4 query heads per group, as in the source
        ({"num_heads": 8}, 2),
        ({"num_heads": 24, "num_query_groups": 8}, 8),
        ({"preset": "llama3-4b"}, 8),
        ({"preset": "llama3-4b", "num_heads": 16}, 4),
    ],
    ids=["24-heads", "8-heads", "set-groups", "preset", "preset-with-heads"],
)
def test_groups_keep_the_source_heads_per_group(given, groups):
    assert resolve_shape(ShapeConfig(**given), PRESETS["llama3-8b"]).num_query_groups == groups


def test_groups_stay_if_heads_do_not_divide():
    source = PRESETS["smollm2-135m"]  # 9 heads in 3 groups
    narrow = dataclasses.replace(source, num_heads=6, num_query_groups=2)  # 3 per group
    assert resolve_shape(ShapeConfig(num_heads=2), narrow).num_query_groups == 2
    text = problems_of(ShapeConfig(num_heads=5), source)[0]
    assert "target.num_heads: 5 heads" in text and "use 3 or 6, or set target.num_query_groups" in text


def test_shape_without_source_derives_sizes():
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96}
    ours = resolve_shape(ShapeConfig(**sizes), None, vocab_size=100)
    assert ours == ModelShape(64, 2, 4, 4, 16, 96, 100)
    assert resolve_shape(ShapeConfig(**sizes, vocab_size=128, head_dim=8), None, 100) == ModelShape(
        64, 2, 4, 4, 8, 96, 128
    )
    assert resolve_shape(ShapeConfig(preset="smollm2-135m"), None, 512).vocab_size == 512
    changed = resolve_shape(ShapeConfig(preset="smollm2-135m", num_heads=6), None)
    assert (changed.num_query_groups, changed.head_dim) == (2, 64)


def test_missing_and_impossible_sizes_are_reported_together():
    missing = problems_of(ShapeConfig(hidden_size=64), None)
    assert [text.split(":")[0] for text in missing] == [
        f"source.shape.{key}" for key in ("num_layers", "num_heads", "intermediate_size", "vocab_size")
    ]
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 5, "intermediate_size": 96, "vocab_size": 9}
    assert "hidden_size 64 / num_heads 5 is no whole number" in problems_of(ShapeConfig(**sizes), None)[0]
    bad = ShapeConfig(num_heads=9, num_query_groups=2, head_dim=63, norm_eps=0.0)
    texts = problems_of(bad, PRESETS["smollm2-135m"])
    assert [text.split(":")[0] for text in texts] == [
        "target.num_query_groups", "target.head_dim", "target.norm_eps"
    ]  # fmt: skip
    assert "use 1 or 3" in texts[0] and "use 62 or 64" in texts[1]
    assert problems_of(ShapeConfig(hidden_size=-1), PRESETS["smollm2-135m"]) == [
        "target.hidden_size: -1 is not a size; use 1 or more"
    ]
