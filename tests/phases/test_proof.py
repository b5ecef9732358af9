"""A cut is proved on real text: what only rounding tells apart passes, what a fault does to a tensor does not."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.budget import slow
from helpers.jobs import job
from helpers.ranks import LiveRanks
from helpers.tiny import LAYOUTS, Tiny, finish
from megashear.config.schema import Config
from megashear.errors import ModelError
from megashear.masks.fold import Folding
from megashear.masks.rotation import Rotation
from megashear.phases.finalize import report
from megashear.phases.proof import EXACT_TOLERANCE, TOLERANCE

MASSIVE = 1e4


@pytest.fixture(scope="module")
def amplifying(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose first layer writes one massive unit that no later norm reads, turned so that all units hold it.

    Whatever reads the stream has to cancel it, and keeps the others' digits less some four.
    """
    model = LlamaForCausalLM.from_pretrained(tiny.source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
    model.double()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] *= MASSIVE
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight") and "layers.0" not in name:
                weight[0] = 0.0
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(7)).double()).Q
    rotation = Rotation(basis, weights.__getitem__)
    model.load_state_dict({name: rotation(name) for name in weights})
    folder = tmp_path_factory.mktemp("amplifying")
    model.float().save_pretrained(folder)
    for path in tiny.source.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def cut(tiny: Tiny, folder: Path, *keys: str) -> Config:
    return tiny.config(folder, "prune.method=one_shot", "prune.basis=source", "run.phases=[prune,finalize]", *keys)


def proof(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "finalize/done.json").read_text())


def test_rounding_that_a_model_amplifies_is_told_from_a_fault(tiny: Tiny, amplifying: Path, tmp_path: Path) -> None:
    finish(cut(tiny, tmp_path / "run", f"source.folder={amplifying}", "target={intermediate_size: 32}"))
    found = proof(tmp_path / "run")
    assert TOLERANCE < found["logit_difference"] < 0.01
    assert 0 < found["exact_difference"] <= EXACT_TOLERANCE
    assert "amplifies rounding" in report(found)


@pytest.mark.parametrize("layout", ["tensor", *slow("pipeline")])
def test_every_layout_tells_rounding_from_a_fault(
    ranks: LiveRanks, tiny: Tiny, amplifying: Path, tmp_path: Path, layout: str
) -> None:
    keys = ["prune.method=one_shot", "prune.basis=source", "run.phases=[prune,finalize]", f"source.folder={amplifying}"]
    keys += ["prune.importance.criterion=magnitude", "prune.refit=0", *LAYOUTS[layout]]
    ranks(2).call("helpers.jobs:run_all", jobs=[job(tiny.file(tmp_path / "run"), *keys)])
    assert proof(tmp_path / "run")["exact_difference"] <= EXACT_TOLERANCE


def test_an_ordinary_model_needs_no_fp64(tiny: Tiny, tmp_path: Path) -> None:
    finish(cut(tiny, tmp_path / "run"))
    found = proof(tmp_path / "run")
    assert found["logit_difference"] <= TOLERANCE and found["exact_difference"] is None
    assert "amplifies" not in report(found)


def test_a_wrong_tensor_is_no_rounding(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = Folding.__call__

    def wrong(self: Folding, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        made = fold(self, name, tensor)
        return (made[0], made[1] * 1.001) if made is not None and "o_proj" in name else made

    with patch.object(Folding, "__call__", wrong), pytest.raises(ModelError, match="bug in megashear"):
        finish(cut(tiny, tmp_path / "run"))
    assert not (tmp_path / "run/pruned").exists() and not (tmp_path / "run/finalize/done.json").exists()
    finish(cut(tiny, tmp_path / "run"))
    assert proof(tmp_path / "run")["logit_difference"] <= TOLERANCE
