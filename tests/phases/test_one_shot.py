"""One-shot pruning and warm starts as runs: exact shapes, kept units, what is cut, resuming, layouts, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.budget import slow
from helpers.jobs import job
from helpers.ranks import LiveRanks
from helpers.tiny import LAYOUTS, Tiny, finish, run, without_pictures
from megashear.config.schema import Config
from megashear.errors import CheckpointError, Interrupted
from megashear.hf.model_folder import ModelFolder
from megashear.importance import calibrate
from megashear.masks.kept_units import kept_units_of
from megashear.masks.mask_specs import mask_specs
from megashear.masks.unit_scores import load_scores
from megashear.phases import score_units as importance
from megashear.plots.run_plots import read_masks
from megashear.processes import StopRequest

KEPT = {"hidden": 24, "layer": 2, "group": 2, "query": 4, "head": 4, "intermediate": 64}
"""Units of the tiny target, over its layers."""


def one_shot(tiny: Tiny, folder: Path, criterion: str = "taylor_mask", *overrides: str) -> Config:
    """A run of `prune` and `finalize` alone, whose cut is all that it does to the weights."""
    keys = ["prune.method=one_shot", f"prune.importance.criterion={criterion}", "prune.importance.batches=2"]
    keys.append("prune.refit=0")
    return tiny.config(folder, *keys, "run.phases=[prune,finalize]", *overrides)


def record(folder: Path, phase: str) -> dict[str, Any]:
    return json.loads((folder / phase / "done.json").read_text())


@pytest.mark.parametrize(
    ("criterion", "layers"),
    [("magnitude", "null"), ("taylor_mask", "null"), ("taylor_weight", "block_influence"), ("activation", "null")],
)
def test_units_of_the_highest_scores_are_cut_out_of_the_source(
    tiny: Tiny, tmp_path: Path, criterion: str, layers: str
) -> None:
    """Every tensor of the pruned model is a part of the source's, bit for bit."""
    config = one_shot(tiny, tmp_path / "run", criterion, f"prune.importance.layer_criterion={layers}")
    finish(config)
    source, pruned = ModelFolder.open(tiny.source), ModelFolder.open(tmp_path / "run/pruned")
    shape = pruned.shape
    sizes = (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_query_groups, shape.intermediate_size)
    assert sizes == (24, 2, 2, 1, 32)
    assert not (tmp_path / "run/masked").exists()
    scores = load_scores(tmp_path / "run/importance.safetensors")[0]
    keep = kept_units_of(scores.units, mask_specs(source.shape, shape), source.shape)
    assert torch.equal(
        pruned.read("model.embed_tokens.weight"), source.read("model.embed_tokens.weight").float()[:, keep.hidden]
    )
    for number, layer in enumerate(keep.layer.tolist()):
        up = source.read(f"model.layers.{layer}.mlp.up_proj.weight").float()
        wanted = up[keep.intermediate[layer]][:, keep.hidden]
        assert torch.equal(pruned.read(f"model.layers.{number}.mlp.up_proj.weight"), wanted)
        out = source.read(f"model.layers.{layer}.self_attn.o_proj.weight").float().view(32, -1, shape.head_dim)
        wanted = out[keep.hidden][:, keep.head[layer]].flatten(1)
        assert torch.equal(pruned.read(f"model.layers.{number}.self_attn.o_proj.weight"), wanted)
    shown = read_masks(tmp_path / "run/masks.npz")
    for name in ("head", "intermediate"):
        wanted = torch.zeros(shown[name].shape).scatter_(1, getattr(keep, name), 1.0)
        assert np.array_equal(shown[name] * shown["layer"][:, None] != 0, wanted.numpy() * shown["layer"][:, None] != 0)
    assert shown["hidden"].nonzero()[0].tolist() == keep.hidden.tolist()
    done = record(tmp_path / "run", "prune")
    assert (done["tokens"], done["calibration_tokens"]) == (0, 0 if criterion == "magnitude" else 2 * 8 * 32)
    assert (done["calibration_flops"] > 0) == (criterion != "magnitude")
    finalized = record(tmp_path / "run", "finalize")
    assert finalized["logit_difference"] <= 1e-5
    assert finalized["kept"] == KEPT
    assert sum(scores.samples.values()) == (0 if criterion == "magnitude" else 16)


def test_what_the_cut_kept_is_recorded_after_learned_masks_as_well(unbroken_folder: Path) -> None:
    assert record(unbroken_folder, "finalize")["kept"] == KEPT


def test_a_run_goes_on_to_pretraining_with_the_source_s_losses(tiny: Tiny, tmp_path: Path) -> None:
    config = one_shot(
        tiny, tmp_path / "run", "fisher", "run.phases=[prune,finalize,pretrain]", "mixture.references=source"
    )
    finish(config)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["losses"]) == {"source", "pruned", "final"}
    assert summary["tokens"] == {"prune": 0, "pretrain": 6 * 8 * 32}
    assert ModelFolder.open(tmp_path / "run/final").shape.hidden_size == 24
    phases = ModelFolder.open(tmp_path / "run/pruned").provenance["phases"]
    assert [phase["name"] for phase in phases] == ["prune"]


def test_stopped_while_scoring_it_scores_again_and_a_finished_file_is_used(tiny: Tiny, tmp_path: Path) -> None:
    finish(one_shot(tiny, tmp_path / "whole"))
    config, request = one_shot(tiny, tmp_path / "run"), StopRequest()

    def ask(*arguments: Any) -> Any:
        request.received = "a test"
        return original(*arguments)

    original = calibrate.sum_over_world
    with patch.object(calibrate, "sum_over_world", ask), without_pictures(), pytest.raises(Interrupted):
        run(config, stop=request)
    assert not (tmp_path / "run/importance.safetensors").exists()
    finish(config)
    same(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run/prune")
    shutil.rmtree(tmp_path / "run/pruned")
    (tmp_path / "run/finalize/done.json").unlink()
    with patch.object(importance, "compute_scores", side_effect=AssertionError("computed again")):
        finish(config)
    same(tmp_path / "run", tmp_path / "whole")


def same(one: Path, other: Path) -> None:
    """The bits of scores and of the pruned model."""
    for name in ("importance.safetensors", "pruned/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("layout", ["tensor", *slow("pipeline")])
def test_several_ranks_prune_as_one(ranks: LiveRanks, tiny: Tiny, tmp_path: Path, layout: str) -> None:
    finish(one_shot(tiny, tmp_path / "whole"))
    config = ["prune.method=one_shot", "prune.importance.criterion=taylor_mask", "prune.importance.batches=2"]
    config.append("prune.refit=0")
    one = job(tiny.file(tmp_path / "run"), *config, "run.phases=[prune,finalize]", *LAYOUTS[layout])
    ranks(2).call("helpers.jobs:run_all", jobs=[one])
    wanted = load_file(tmp_path / "whole/importance.safetensors")
    for part, value in load_file(tmp_path / "run/importance.safetensors").items():
        limit = 1e-4 if part.startswith("error") else 1e-5
        assert (value - wanted[part]).abs().max() <= limit * wanted[part].abs().max(), part
    pruned = [(tmp_path / name / "pruned/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert pruned[0] == pruned[1]


@pytest.mark.parametrize("damage", ["missing", "cut off", "another seed"])
def test_scores_that_are_gone_or_others_are_refused(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    finish(one_shot(tiny, tmp_path / "run", "magnitude", "run.phases=[prune]"))
    path = tmp_path / "run/importance.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:100])
    if damage == "another seed":
        finish(one_shot(tiny, tmp_path / "other", "magnitude", "run.phases=[prune]", "run.seed=4"))
        shutil.copy(tmp_path / "other/importance.safetensors", path)
    what = {"missing": "missing", "cut off": "no scores of units, or damaged", "another seed": "scores of another"}
    with pytest.raises(CheckpointError, match=rf"importance\.safetensors: {what[damage]}.*; restore it from a copy"):
        finish(one_shot(tiny, tmp_path / "run", "magnitude"))
    shutil.rmtree(tmp_path / "run/prune")
    path.unlink(missing_ok=True)
    finish(one_shot(tiny, tmp_path / "run", "magnitude"))


def test_learned_masks_start_from_scores(tiny: Tiny, tmp_path: Path) -> None:
    keys = ["prune.importance.criterion=taylor_mask", "prune.importance.batches=2", "run.phases=[prune]"]
    keys += ["prune.importance.spread=4", "prune.mask_learning_rate=0", "prune.optimizer.warmup_steps=0"]
    config = tiny.config(tmp_path / "run", *keys, "prune.batch.steps=1", "prune.freeze_steps=0")
    finish(config)
    scores = load_scores(tmp_path / "run/importance.safetensors")[0]
    masks = load_file(tmp_path / "run/prune/step-00000001/masks.safetensors")
    for name in ("hidden", "group", "intermediate", "layer"):
        order = masks[f"log_alpha.{name}"].argsort(dim=-1, stable=True)
        assert torch.equal(order, scores.units[name].argsort(dim=-1, stable=True))
