"""Watching a pruning phase: what counts as destroyed, which granularity is named; a sound run hears nothing."""

import logging
import math
import re
from pathlib import Path
from unittest.mock import patch

import pytest

from helpers.tiny import Tiny, finish
from megashear.config.training_schema import ImportanceConfig, PruneConfig
from megashear.train.divergence_watch import ahead, confirmed, limit, smoothed, verdict


def test_the_smoothed_loss_forgets_and_passes_over_skipped_steps() -> None:
    average = smoothed(None, 4.0)
    assert average == 4.0
    assert smoothed(average, 9.0) == pytest.approx(5.0)
    assert smoothed(average, math.nan) == 4.0
    assert smoothed(None, math.inf) is None and smoothed(None, math.nan) is None


def test_the_limit_is_a_third_of_the_way_to_knowing_nothing() -> None:
    assert limit(2.0, round(math.exp(5.0))) == pytest.approx(3.0, abs=1e-2)
    assert limit(7.0, 100) == 7.5


def test_the_verdict_names_what_rises_most() -> None:
    text = verdict(10, 7.0, 3.0, {"open": 3.1, "hidden": 3.6, "layer": 6.0}, PruneConfig())
    assert "layer +2.90, hidden +0.50" in text and "Most of it is layer" in text and "step 10" in text
    assert "projected" not in text and "criterion" not in text  # both are set


def test_the_verdict_advises_what_is_not_set() -> None:
    published = PruneConfig(constraint="lagrangian", importance=ImportanceConfig(criterion=None))
    text = verdict(10, 7.0, 3.0, {"open": 3.1, "hidden": 3.6}, published)
    assert "prune.constraint: projected" in text and "prune.importance.criterion" in text


def test_weights_that_destroy_the_model_are_not_taken_for_masks() -> None:
    text = verdict(120, 9.6, 1.75, {"open": 9.5, "hidden": 9.6, "head": 9.5}, PruneConfig())
    assert "the weights' training is destroying" in text and "prune.optimizer.learning_rate" in text
    assert "Most of it is hidden" not in text


def test_masks_ahead_of_their_schedule_are_named() -> None:
    target = {"hidden": 0.2, "layer": 0.0}
    assert ahead(8, {"hidden": 0.29, "layer": 0.0}, target) is None
    assert ahead(8, {"hidden": 0.0, "layer": 0.0}, target) is None
    text = ahead(8, {"hidden": 0.43, "layer": 0.0}, target)
    assert text is not None and "hidden 43% closed, 20% asked for" in text and "layer" not in text


def warnings_of(tiny: Tiny, folder: Path, caplog: pytest.LogCaptureFixture, *overrides: str) -> list[str]:
    with caplog.at_level(logging.WARNING):
        finish(tiny.config(folder, "run.phases=[prune]", *overrides))
    return [r.getMessage() for r in caplog.records if "destroying" in r.getMessage()]


def test_a_run_that_is_destroyed_says_so_once(
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights thrown about by a large rate: the loss of a random source is near ln V, and they take it far above."""
    loud = ("prune.optimizer.learning_rate=1.0", "prune.optimizer.warmup_steps=0")
    said = warnings_of(tiny, tmp_path / "loud", caplog, *loud)
    assert len(said) == 1 and "hidden" in said[0] and "the weights' training is destroying" in said[0]


def test_masks_that_overshoot_are_told_once(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ["prune.constraint=lagrangian", "prune.lambda_learning_rate=50", "prune.mask_learning_rate=5"]
    with caplog.at_level(logging.WARNING):
        finish(tiny.config(tmp_path / "run", "run.phases=[prune]", "prune.batch.steps=20", *keys))
    assert len([record for record in caplog.records if "ahead of their schedule" in record.getMessage()]) == 1


def test_harder_text_is_not_taken_for_destruction(
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A high training loss that no held-out sequence shows is looked into at steps 1, 2, 4, 8, and not told."""
    assert confirmed(3.0, 3.6, 3.6) and confirmed(3.0, 3.0, 3.6) and not confirmed(3.0, 3.3, 3.6)
    with (
        patch("megashear.train.divergence_watch.limit", return_value=-1.0),
        patch("megashear.train.divergence_watch.confirmed", wraps=confirmed) as asked,
    ):
        keys = ("prune.optimizer.learning_rate=1e-4", "prune.batch.steps=9")
        assert warnings_of(tiny, tmp_path / "run", caplog, *keys) == []
    assert asked.call_count == 4


def test_a_sound_run_says_nothing(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(tiny, tmp_path / "sound", caplog, "prune.optimizer.learning_rate=1e-4") == []


@pytest.fixture(scope="module")
def learned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that has something to lose: far below ln V."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    keys = ["target=null", "mixture.rule=static", "pretrain.batch.eval_interval=100"]
    finish(
        tiny.config(
            folder,
            *keys,
            "pretrain.batch.steps=60",
            "pretrain.optimizer.learning_rate=1e-2",
            run={"seed": 3, "phases": ["pretrain"]},
        )
    )
    return folder / "final"


def test_masks_that_destroy_a_model_are_named_as_soon_as_they_have_closed(
    tiny: Tiny,
    learned: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The weights cannot follow: all of the loss is due to the masks, most of it to what closes most."""
    target = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_query_groups": 2, "intermediate_size": 46}
    keys = ["prune.optimizer.learning_rate=1e-7", "prune.batch.steps=40", "prune.sparsity_warmup_steps=20"]
    sections = {"source": {"folder": str(learned)}, "target": target}
    with caplog.at_level(logging.WARNING):
        finish(tiny.config(tmp_path / "run", "run.phases=[prune]", *keys, **sections))
    (said,) = [r.getMessage() for r in caplog.records if "destroying" in r.getMessage()]
    assert "the masks are destroying" in said and "Most of it is layer:" in said
    assert int(re.findall(r"step (\d+):", said)[0]) < 20 + 8 < 36, "closed at 20, fixed from 36 of 40 on"
