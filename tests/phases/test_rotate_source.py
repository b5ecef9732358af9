"""Pruning in the principal basis as runs: chosen by default where hidden units go, one function, resumed, dropped."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.tiny import Tiny, break_off, die, differing, finish, results
from megashear.hf.model_folder import ModelFolder
from megashear.masks.rotation import Rotation
from megashear.phases import rotate_source as basis
from megashear.phases import source_losses, training


@pytest.fixture(scope="module")
def untied(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny inputs with an output of its own, and norms that are not all 1."""
    folder = tmp_path_factory.mktemp("untied")
    other = object.__new__(Tiny)
    other.folder, other.source, other.data = folder, folder / "source", tiny.data
    model = LlamaForCausalLM.from_pretrained(tiny.source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            if name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.3 * torch.sin(torch.arange(32.0) + number))
    model.save_pretrained(other.source)
    for path in tiny.source.glob("token*"):
        (other.source / path.name).write_bytes(path.read_bytes())
    return other


def prune_record(folder: Path) -> dict:
    return json.loads((folder / "prune/done.json").read_text())


@pytest.mark.parametrize("tied", [False, True])
def test_the_default_is_the_principal_basis(untied: Tiny, tiny: Tiny, tmp_path: Path, tied: bool) -> None:
    inputs, keys = tiny if tied else untied, ["prune.method=one_shot", "prune.refit=2", "run.phases=[prune,finalize]"]
    finish(inputs.config(tmp_path / "run", *keys, "prune.basis=null"))
    assert prune_record(tmp_path / "run")["principal"]
    assert not (tmp_path / "run/principal").exists()
    embedding = ModelFolder.open(tmp_path / "run/pruned").read("model.embed_tokens.weight")
    own = ModelFolder.open(inputs.source).read("model.embed_tokens.weight")
    assert not any(torch.allclose(embedding[:, 0], column, atol=1e-3) for column in own.T)


def test_the_sources_own_units_where_they_are_asked_for_or_all_stay(untied: Tiny, tmp_path: Path) -> None:
    keys = ["prune.method=one_shot", "prune.refit=2", "run.phases=[prune,finalize]"]
    finish(untied.config(tmp_path / "own", *keys, "prune.basis=source"))
    assert not prune_record(tmp_path / "own")["principal"]
    finish(untied.config(tmp_path / "all", *keys, "prune.basis=null", "target.hidden_size=32"))
    assert not prune_record(tmp_path / "all")["principal"]


def test_the_rotated_source_is_the_source(untied: Tiny, tmp_path: Path) -> None:
    """Held-out losses at the start of pruning, evaluated on the rotated weights, equal those without a rotation."""
    losses = []
    for chosen in ("principal", "source"):
        folder = tmp_path / chosen
        finish(
            untied.config(
                folder, "prune.method=one_shot", "prune.refit=2", "run.phases=[prune]", f"prune.basis={chosen}"
            )
        )
        losses.append(json.loads((folder / "source_losses.json").read_text()))
    for domain, (loss, error) in losses[0].items():
        assert abs(loss - losses[1][domain][0]) <= 1e-5 * loss
        assert abs(error - losses[1][domain][1]) <= 1e-4 * error
    logits = []
    for folder in (untied.source, tmp_path / "principal/principal"):
        with torch.no_grad():
            logits.append(LlamaForCausalLM.from_pretrained(folder)(torch.arange(40)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_a_turn_that_costs_is_warned_of(
    untied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ["prune.method=one_shot", "prune.refit=2", "prune.basis=principal", "run.phases=[prune]"]
    finish(untied.config(tmp_path / "sound", *keys))
    assert "principal basis" not in caplog.text
    turned = Rotation.__call__
    monkeypatch.setattr(Rotation, "__call__", lambda self, name: turned(self, name) * (1 + 99 * ("lm_head" in name)))
    finish(untied.config(tmp_path / "wrong", *keys))
    assert "the turn changed the held-out loss" in caplog.text


@pytest.mark.parametrize("method", ["one_shot", "learned"])
def test_evaluations_of_the_source_are_told_from_calibration(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As the source and as turned: evaluation in the record of one shot, and no part of a learned run's calibration."""
    spent = {"evaluate_heldout": 0.0, "importance_scores": 0.0}

    def timed(module: Any, name: str, pause: float) -> None:
        original = getattr(module, name)

        def call(*arguments: Any) -> Any:
            started = time.monotonic()
            time.sleep(pause)
            value = original(*arguments)
            spent[name] += time.monotonic() - started
            return value

        monkeypatch.setattr(module, name, call)

    timed(basis, "evaluate_heldout", 0.5)
    timed(source_losses, "evaluate_heldout", 0.5)
    timed(training, "importance_scores", 0.0)
    keys = [f"prune.method={method}", "prune.importance.criterion=magnitude", "run.phases=[prune]"]
    finish(tiny.config(tmp_path / "run", *keys, "prune.basis=principal"))
    record = prune_record(tmp_path / "run")
    assert spent["evaluate_heldout"] > 1.0
    if method == "one_shot":
        assert record["seconds"] > record["evaluation_seconds"] >= spent["evaluate_heldout"]
    else:
        assert 0 < record["calibration_seconds"] < spent["importance_scores"] - 0.9 * spent["evaluate_heldout"]


def test_what_a_killed_run_left_goes(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", "prune.method=one_shot", "prune.refit=2", "run.phases=[prune,finalize]")
    finish(config)
    for name in ("principal", "fitted"):
        (tmp_path / "run" / name).mkdir()
    finish(config)
    assert not (tmp_path / "run/principal").exists() and not (tmp_path / "run/fitted").exists()


def test_few_directions_lose_less_than_few_units(untied: Tiny, tmp_path: Path, monkeypatch) -> None:
    share_kept, shares = basis.share_kept, []

    def noted(*arguments: Any) -> float:
        shares.append(share_kept(*arguments))
        return shares[-1]

    monkeypatch.setattr(basis, "share_kept", noted)
    finish(
        untied.config(
            tmp_path / "run", "prune.method=one_shot", "prune.refit=2", "run.phases=[prune]", "prune.basis=principal"
        )
    )
    principal, own = shares
    assert 1.0 > principal > own > 0.0


def test_a_killed_run_goes_on_in_the_same_basis(untied: Tiny, tmp_path: Path) -> None:
    whole, broken = (untied.config(tmp_path / name, "prune.basis=principal") for name in ("whole", "broken"))
    finish(whole)
    assert break_off(broken, ("prune", 5), die)
    assert (tmp_path / "broken/principal").exists()
    finish(broken)
    assert differing(results(tmp_path / "whole"), results(tmp_path / "broken")) == []
    assert not (tmp_path / "broken/principal").exists()


def test_a_tied_source_turns(tiny: Tiny, tmp_path: Path) -> None:
    """Its final norm has one weight for all units, as at birth: then nothing of its function is lost."""
    finish(tiny.config(tmp_path / "run", "run.phases=[prune]", "prune.basis=principal"))
    rotated = tmp_path / "run/principal"
    logits = []
    for folder in (tiny.source, rotated):
        with torch.no_grad():
            logits.append(LlamaForCausalLM.from_pretrained(folder)(torch.arange(40)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    assert prune_record(tmp_path / "run")["principal"]
    finish(tiny.config(tmp_path / "run", "prune.basis=principal"))
    assert ModelFolder.open(tmp_path / "run/final").shape.tie_word_embeddings
    assert json.loads((tmp_path / "run/finalize/done.json").read_text())["logit_difference"] <= 1e-5
