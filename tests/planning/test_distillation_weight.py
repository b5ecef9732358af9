"""Whether the source teaches where the run file leaves it open."""

from pathlib import Path
from typing import Any

import pytest

from megashear.config.presets import PRESETS
from megashear.config.resolve import WEIGHT, distillation_plans, run_tokens, training_tokens_of
from megashear.files.file_digests import write_manifest
from planning.test_check import config

SOURCE, SMALL = PRESETS["llama2-7b"], PRESETS["sheared-1.3b"]
PAPER = "prune.preset=paper"


@pytest.mark.parametrize(
    ("target", "overrides", "prune", "pretrain"),
    [
        ("sheared-2.7b", [], WEIGHT, WEIGHT),
        ("sheared-1.3b", [], 0, 0),  # the source's forward pass takes 1.7 times what training the target does
        ("sheared-1.3b", ["prune.distillation.weight=0.25"], 0.25, 0.25),
        ("sheared-2.7b", ["prune.distillation.weight=0"], 0, 0),
        ("sheared-2.7b", ["pretrain.distillation.weight=0"], WEIGHT, 0),
        ("sheared-2.7b", [PAPER], 0, 0),
        ("sheared-2.7b", [PAPER, "pretrain.distillation.weight=1"], 0, 1),
        ("sheared-2.7b", ["prune.method=one_shot"], WEIGHT, WEIGHT),
        ("sheared-2.7b", ["prune.method=one_shot", "prune.distillation.weight=0"], 0, 0),
        ("sheared-2.7b", ["source.folder=null"], 0, 0),  # weights out of the seed
        ("sheared-2.7b", ["source.folder=null", "pretrain.distillation.weight=0.5"], 0, 0.5),  # refused by `check`
    ],
)
def test_an_open_weight(tmp_path: Path, target: str, overrides: list[str], prune: float, pretrain: float) -> None:
    found = distillation_plans(config(tmp_path, *overrides), SOURCE, PRESETS[target])
    assert (found["prune"].weight, found["pretrain"].weight) == (prune, pretrain)


def test_without_source_or_target_nobody_teaches(tmp_path: Path) -> None:
    for source, target in ((None, SMALL), (SOURCE, None), (None, None)):
        assert [how.weight for how in distillation_plans(config(tmp_path), source, target).values()] == [0, 0]


def test_the_other_keys_are_the_sections(tmp_path: Path) -> None:
    keys = ["prune.distillation.temperature=2", "pretrain.distillation.chunk=7", "pretrain.distillation.stop_when=end"]
    found = distillation_plans(config(tmp_path, *keys), SOURCE, SMALL)
    assert (found["prune"].temperature, found["prune"].stop_when) == (2, "student_better")
    assert (found["pretrain"].chunk, found["pretrain"].stop_when) == (7, "end")


@pytest.mark.parametrize(
    ("provenance", "tokens"),
    [
        ({"phases": [{"name": "pretrain", "tokens": 5}]}, 5),
        ({"phases": [{"tokens": 3}, {"name": "finalize"}, {"tokens": 4}], "source": {"tokens": 10}}, 17),
        ({"phases": [{"tokens": 3}], "source": {"path": "foreign"}}, None),  # what came before is not known
        ({"source": {"path": "imported"}}, None),
        ({}, None),
        ({"phases": 7}, None),
        ({"phases": [{"tokens": -5}]}, None),
        (None, None),
    ],
)
def test_the_tokens_that_a_source_has_seen(tmp_path: Path, provenance: dict[str, Any] | None, tokens: int) -> None:
    write_manifest(tmp_path, {} if provenance is None else {"provenance": provenance})
    assert training_tokens_of(tmp_path) == tokens
    assert training_tokens_of(tmp_path / "nowhere") is None


def test_a_foreign_manifest_may_hold_any_number(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": {}, "provenance": {"phases": [{"tokens": 1e999}]}}')
    assert training_tokens_of(tmp_path) is None


def test_a_source_that_has_seen_no_more_than_the_run_takes_does_not_teach_unasked(tmp_path: Path) -> None:
    keys = [f"source.folder={tmp_path / 'source'}", "prune.batch.steps=100", "pretrain.batch.steps=300"]
    run = config(tmp_path, *keys)
    taken = run_tokens(run)
    sequences = 100 * run.prune.batch.global_batch + 300 * run.pretrain.batch.global_batch
    assert taken == sequences * run.data.sequence_length
    (tmp_path / "source").mkdir()
    for seen, weight in ((taken + 1, WEIGHT), (taken, 0)):
        write_manifest(tmp_path / "source", {"provenance": {"phases": [{"name": "pretrain", "tokens": seen}]}})
        found = distillation_plans(config(tmp_path, *keys), SOURCE, PRESETS["sheared-2.7b"])
        assert [how.weight for how in found.values()] == [weight, weight]
        asked = distillation_plans(
            config(tmp_path, *keys, "prune.distillation.weight=0.25"), SOURCE, PRESETS["sheared-2.7b"]
        )
        assert [how.weight for how in asked.values()] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("record", "weight"),
    [
        (None, 0),  # has not started: by the source's tokens
        ('{"open_distillation_weight": 0.5}', WEIGHT),
        ('{"open_distillation_weight": 0.0}', 0),
        ("[]", 0),  # `run` refuses these two
        ("{", 0),
    ],
)
def test_what_a_run_recorded_counts(tmp_path: Path, record: str | None, weight: float) -> None:
    keys = [f"source.folder={tmp_path / 'source'}", f"run.folder={tmp_path / 'run'}"]
    for name in ("source", "run"):
        (tmp_path / name).mkdir()
    write_manifest(tmp_path / "source", {"provenance": {"phases": [{"name": "pretrain", "tokens": 5}]}})
    if record is not None:
        (tmp_path / "run" / "identity.json").write_text(record)
    found = distillation_plans(config(tmp_path, *keys), SOURCE, PRESETS["sheared-2.7b"])
    assert [how.weight for how in found.values()] == [weight, weight]
