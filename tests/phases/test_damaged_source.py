"""Sources that nothing can be computed of, or nothing but zeros: said in one message that fits, or carried through."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import Tiny, finish
from megashear.errors import TrainingError
from megashear.phases import proof

CUT = ("prune.method=one_shot", "run.phases=[prune,finalize]", "prune.importance.batches=2")


def changed(tiny: Tiny, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the source with other weights."""
    shutil.copytree(tiny.source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prune.basis=principal"], r"principal basis: the source's activations are not .*; check the source"),
        (
            ["prune.importance.criterion=taylor_mask"],
            r"importance: scores of hidden.* not finite .*; check the source",
        ),
        (["prune.importance.criterion=activation"], r"importance: scores of .* not finite numbers; check the source"),
        (["prune.importance.criterion=magnitude"], r"magnitudes of .*intermediate.* so weights of .*/source are not"),
    ],
)
def test_a_weight_that_is_not_a_number_is_told_by_what_it_spoils(
    tiny: Tiny, tmp_path: Path, overrides: list[str], words: str
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = math.nan

    source = changed(tiny, tmp_path / "source", spoil)
    with pytest.raises(TrainingError, match=words):
        finish(tiny.config(tmp_path / "run", *CUT, *overrides, f"source.folder={source}"))


def test_a_source_whose_logits_are_all_zero_is_cut(tiny: Tiny, tmp_path: Path) -> None:
    def clear(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"].zero_()

    source = changed(tiny, tmp_path / "source", clear)
    finish(tiny.config(tmp_path / "run", *CUT, "prune.refit=0", f"source.folder={source}"))
    assert json.loads((tmp_path / "run/finalize/done.json").read_text())["logit_difference"] == 0.0


@pytest.mark.parametrize(
    ("expected", "found", "apart"),
    [
        ([2.0, -4.0], [2.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], math.inf),
        ([1.0, math.nan], [1.0, 1.0], math.nan),
        ([1.0, math.inf], [1.0, math.inf], math.nan),
        ([1.0, 1.0], [math.nan, 1.0], math.nan),
    ],
)
def test_how_far_logits_are_apart(
    monkeypatch: pytest.MonkeyPatch, expected: list[float], found: list[float], apart: float
) -> None:
    """Columns beyond the vocabulary are left out; no largest is ever taken of NaN, which backends do differently."""

    def largest(pair: torch.Tensor) -> torch.Tensor:
        assert not bool(pair.isnan().any())
        return pair

    monkeypatch.setattr(proof, "max_over_world", largest)
    monkeypatch.setattr(proof, "sum_over_world", lambda count: count)
    context: Any = SimpleNamespace(
        source_shape=SimpleNamespace(vocab_size=2), layout=SimpleNamespace(device=torch.device("cpu"))
    )
    pairs = [[torch.tensor([[[*values, 99.0 * number]]])] for number, values in enumerate((expected, found))]
    result = proof._apart(context, *pairs)
    assert math.isnan(result) if math.isnan(apart) else result == apart
    assert proof.Proof(result, None).holds == (apart == 0.0)
