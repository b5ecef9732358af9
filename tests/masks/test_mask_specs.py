"""Which masks are learned, with which sizes, and what is refused."""

import pytest

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PRESETS
from megashear.errors import ConfigError
from megashear.masks.mask_specs import MaskSpec, mask_specs

LLAMA_370M = ModelShape(1024, 24, 8, 8, 128, 2816, 32000)


@pytest.mark.parametrize(
    ("name", "target"),
    [("to1p3b", PRESETS["sheared-1.3b"]), ("to2p7b", PRESETS["sheared-2.7b"]), ("to370m", LLAMA_370M)],
)
def test_llama2_7b_has_the_published_targets_and_sizes(published, name, target):
    order = ("group", "intermediate", "layer", "hidden")
    specs = {spec.name: spec for spec in mask_specs(PRESETS["llama2-7b"], target, order)}
    assert [specs[key].rows * specs[key].units for key in order] == published[f"H/{name}/n_mask_params"].tolist()
    sparsities = published[f"H/{name}/per_mask_target_sparsity"].tolist()
    assert [specs[key].target_sparsity for key in order] == pytest.approx(sparsities, abs=1e-12)


def test_what_shrinks_is_learned_in_fixed_order(grouped_source, grouped_target):
    specs = mask_specs(grouped_source, grouped_target)
    assert specs == [
        MaskSpec("hidden", (16,), 10),
        MaskSpec("group", (3, 4), 3),
        MaskSpec("query", (3, 4, 3), 2),
        MaskSpec("intermediate", (3, 20), 12),
        MaskSpec("layer", (3,), 2),
    ]
    assert [spec.index for spec in specs] == [0, 1, 2, 3, 4]
    assert [(spec.rows, spec.units, spec.zeros_per_row) for spec in specs][2] == (12, 3, 1)


def test_what_stays_is_not_learned_unless_listed():
    source, target = PRESETS["llama2-7b"], PRESETS["sheared-2.7b"]
    assert [spec.name for spec in mask_specs(source, target)] == ["hidden", "group", "intermediate"]
    listed = mask_specs(source, target, ["layer", "intermediate", "group", "hidden"])
    assert [(spec.name, spec.zeros_per_row) for spec in listed][-1] == ("layer", 0)


def test_all_problems_come_at_once(source, target):
    with pytest.raises(ConfigError) as caught:
        mask_specs(source, target, ["hiden", "query", "group", "layer"])
    text = str(caught.value)
    assert "did you mean hidden?" in text
    assert "query needs several query heads" in text
    assert "hidden is missing though the target shrinks it from 64 to 40" in text
    assert len(caught.value.problems) == 4


def test_a_target_that_is_the_source_is_refused(source):
    with pytest.raises(ConfigError, match="same shape as the source"):
        mask_specs(source, source)
    with pytest.raises(ConfigError, match="same shape as the source"):
        mask_specs(source, source, ["hidden"])
    with pytest.raises(ConfigError, match="list is empty"):
        mask_specs(source, source, [])
