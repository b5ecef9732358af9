"""A checkpoint saved under one layout and loaded under another holds the same tensors, and training goes on alike.

Tensors (weights, fp32 masters, both moments) are compared bit for bit: the checkpoint is read whole, loaded and saved
again under the second layout, and read whole again. What training makes of them differs by the rounding of sums in
another order; on the same layout by nothing. Sizes (48, 72, 101) fill neither the gradient buffers' 64-element places
nor their buckets.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import Ranks

ONE = {"world": 1}
TP2, PP2, DP2 = {"world": 2, "tensor": 2}, {"world": 2, "pipeline": 2}, {"world": 2}
TP4, PP4, DP4 = {"world": 4, "tensor": 4, "sequence": True}, {"world": 4, "pipeline": 4}, {"world": 4}
TP2_PP2, TP2_DP2 = {"world": 4, "tensor": 2, "pipeline": 2}, {"world": 4, "tensor": 2, "sequence": True}
PP2_DP2, PP2_VP2 = {"world": 4, "pipeline": 2}, {"world": 2, "pipeline": 2, "virtual_pipeline": 2}
ALL = [ONE, TP2, PP2, DP2, TP4, PP4, DP4, TP2_PP2, TP2_DP2, PP2_DP2, PP2_VP2]
MHA, GQA = "multi-head", "grouped"  # the first untied, the second tied

PAIRS = [  # one for each mechanism; `--slow` has all pairs
    (GQA, ONE, TP2),
    (GQA, PP2_VP2, DP2),
    pytest.param(MHA, TP2_PP2, ONE, marks=pytest.mark.expensive("four ranks that train and save")),
    pytest.param(GQA, TP4, TP2_DP2, marks=pytest.mark.expensive("two layouts of four ranks, more than groups")),
]
Saved = Callable[[str, str, str], tuple[Path, dict[str, Any]]]


def name_of(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    short = {"world": "W", "tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VP", "sequence": "SP"}
    return "-".join(f"{short[key]}{int(size)}" for key, size in value.items())


LAYOUTS = {name_of(layout): layout for layout in ALL}


def parallel(layout: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in layout.items() if key != "world"}


@pytest.fixture(scope="module")
def saved(ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoint of (model, layout's name, dtype), and what its maker saw before and after."""

    @cache
    def save(shape: str, layout: str, dtype: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("saved") / "checkpoint"
        sizes = LAYOUTS[layout]
        arguments = {"folder": str(folder), "shape": shape, "parallel": parallel(sizes), "dtype": dtype, "layers": 5}
        return folder, ranks(sizes["world"]).call("parallel.checkpoint_case:train_and_save", **arguments)

    return save


def load(
    ranks: Callable[[int], Ranks], folder: Path, shape: str, layout: dict[str, Any], dtype: str, again: Path
) -> dict[str, Any]:
    arguments = {"folder": str(folder), "shape": shape, "parallel": parallel(layout), "dtype": dtype, "layers": 5}
    return ranks(layout["world"]).call("parallel.checkpoint_case:load_and_train", again=str(again), **arguments)


def check_pair(ranks, saved: Saved, tmp_path: Path, shape: str, first: Any, second: Any, dtype: str) -> None:
    folder, wanted = saved(shape, name_of(first), dtype)
    found = load(ranks, folder, shape, second, dtype, tmp_path / "again")
    assert wanted["weights"].keys() == found["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert torch.equal(found["weights"][name], weight), name
    same_tensors(ranks, folder, tmp_path / "again")
    if first == second:
        assert found["losses"] == wanted["losses"]
        for name, weight in wanted["after"].items():
            assert torch.equal(found["after"][name], weight), name
    elif dtype == "float32":
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        for name, weight in wanted["after"].items():
            # Two updates of at most the learning rate, 0.01 each, through gradients that agree to about 1e-5.
            assert float((found["after"][name] - weight).abs().max()) <= 2e-6, name
    else:
        assert found["losses"] == pytest.approx(wanted["losses"], rel=2**-9)  # half of bf16's spacing


def same_tensors(ranks, first: Path, second: Path) -> None:
    """Weights, masters and moments of two checkpoints have the same bits, but for the vocabulary's padding."""
    one, two = (ranks(1).call("parallel.checkpoint_case:saved_tensors", folder=str(path)) for path in (first, second))
    assert one.keys() == two.keys()
    assert any("exp_avg_sq" in name for name in one)
    for name, tensor in one.items():
        rows = 101 if name.endswith(("embedding.weight", "output.weight")) else len(tensor)
        assert torch.equal(tensor[:rows], two[name][:rows]), name
        assert not two[name][rows:].any(), f"{name}: padding rows are not 0"


@pytest.mark.parametrize(("shape", "first", "second"), PAIRS, ids=name_of)
def test_from_one_layout_to_another(ranks, saved, tmp_path, shape, first, second) -> None:
    check_pair(ranks, saved, tmp_path, shape, first, second, "float32")


@pytest.mark.parametrize(("layout", "dtype"), [(ONE, "float32"), (DP2, "bfloat16")], ids=name_of)
def test_the_same_layout_goes_on_with_the_same_bits(ranks, saved, tmp_path, layout, dtype) -> None:
    check_pair(ranks, saved, tmp_path, GQA, layout, layout, dtype)


@pytest.mark.parametrize(
    ("first", "second"), [(DP2, TP2), pytest.param(PP2_DP2, TP2, marks=pytest.mark.slow)], ids=name_of
)
def test_bf16_with_fp32_masters(ranks, saved, tmp_path, first, second) -> None:
    check_pair(ranks, saved, tmp_path, GQA, first, second, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), list(product(ALL, ALL)), ids=name_of)
@pytest.mark.parametrize("shape", [MHA, GQA])
def test_every_ordered_pair_of_layouts(ranks, saved, tmp_path, shape, first, second) -> None:
    check_pair(ranks, saved, tmp_path, shape, first, second, "float32")
