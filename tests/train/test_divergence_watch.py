"""Divergence warnings of a pruning phase: limits, texts, and which runs get them."""

import logging
import math
import re
from pathlib import Path
from unittest.mock import patch

import pytest

from helpers.tiny import Tiny, finish
from megashear.config.training_schema import ImportanceConfig, PruneConfig
from megashear.train.divergence_watch import (
    ahead_warning,
    divergence_limit,
    divergence_warning,
    is_divergence,
    smoothed,
)


def test_smoothed_loss_ignores_skipped_steps() -> None:
    average = smoothed(None, 4.0)
    assert average == 4.0
    assert smoothed(average, 9.0) == pytest.approx(5.0)
    assert smoothed(average, math.nan) == 4.0
    assert smoothed(None, math.inf) is None and smoothed(None, math.nan) is None


def test_limit_is_a_third_of_the_way_to_a_random_model() -> None:
    assert divergence_limit(2.0, round(math.exp(5.0))) == pytest.approx(3.0, abs=1e-2)
    assert divergence_limit(7.0, 100) == 7.5


def test_warning_names_the_granularity_at_fault() -> None:
    text = divergence_warning(10, 7.0, 3.0, {"none": 3.1, "hidden": 3.6, "layer": 6.0}, PruneConfig())
    assert "layer +2.90, hidden +0.50" in text and "Most of the rise is from layer" in text and "step 10" in text
    assert "projected" not in text and "criterion" not in text  # both are set


def test_warning_advises_settings_not_in_use() -> None:
    published = PruneConfig(constraint="lagrangian", importance=ImportanceConfig(criterion=None))
    text = divergence_warning(10, 7.0, 3.0, {"none": 3.1, "hidden": 3.6}, published)
    assert "prune.constraint: projected" in text and "prune.importance.criterion" in text


def test_warning_distinguishes_weights_from_masks() -> None:
    text = divergence_warning(120, 9.6, 1.75, {"none": 9.5, "hidden": 9.6, "head": 9.5}, PruneConfig())
    assert "training of the weights is destroying" in text and "prune.optimizer.learning_rate" in text
    assert "Most of the rise is from hidden" not in text


def test_warning_names_masks_ahead_of_schedule() -> None:
    target = {"hidden": 0.2, "layer": 0.0}
    assert ahead_warning(8, {"hidden": 0.29, "layer": 0.0}, target) is None
    assert ahead_warning(8, {"hidden": 0.0, "layer": 0.0}, target) is None
    text = ahead_warning(8, {"hidden": 0.43, "layer": 0.0}, target)
    assert text is not None and "hidden sparsity 43%, scheduled 20%" in text and "layer" not in text


def warnings_of(tiny: Tiny, folder: Path, caplog: pytest.LogCaptureFixture, *overrides: str) -> list[str]:
    with caplog.at_level(logging.WARNING):
        finish(tiny.config(folder, "run.phases=[prune]", *overrides))
    return [r.getMessage() for r in caplog.records if "destroying" in r.getMessage()]


def test_divergence_is_warned_once(
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A very large learning rate raises the loss of a random source far above ln V."""
    loud = ("prune.optimizer.learning_rate=1.0", "prune.optimizer.warmup_steps=0")
    found = warnings_of(tiny, tmp_path / "loud", caplog, *loud)
    assert len(found) == 1 and "hidden" in found[0] and "training of the weights is destroying" in found[0]


def test_overshoot_is_warned_once(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ["prune.constraint=lagrangian", "prune.lambda_learning_rate=50", "prune.mask_learning_rate=5"]
    with caplog.at_level(logging.WARNING):
        finish(tiny.config(tmp_path / "run", "run.phases=[prune]", "prune.batch.steps=20", *keys))
    assert len([record for record in caplog.records if "ahead of their schedule" in record.getMessage()]) == 1


def test_hard_text_is_not_divergence(
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A high training loss that no held-out sequence shows is checked at steps 1, 2, 4 and 8, without a warning."""
    assert is_divergence(3.0, 3.6, 3.6) and is_divergence(3.0, 3.0, 3.6) and not is_divergence(3.0, 3.3, 3.6)
    with (
        patch("megashear.train.divergence_watch.divergence_limit", return_value=-1.0),
        patch("megashear.train.divergence_watch.is_divergence", wraps=is_divergence) as asked,
    ):
        keys = ("prune.optimizer.learning_rate=1e-4", "prune.batch.steps=9")
        assert warnings_of(tiny, tmp_path / "run", caplog, *keys) == []
    assert asked.call_count == 4


def test_sound_run_has_no_warning(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(tiny, tmp_path / "sound", caplog, "prune.optimizer.learning_rate=1e-4") == []


@pytest.fixture(scope="module")
def learned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained source, with a loss far below ln V."""
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


def test_destructive_masks_are_named_early(
    tiny: Tiny,
    learned: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With almost no learning rate the masks cause all of the rise, most of it the layer masks."""
    target = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_query_groups": 2, "intermediate_size": 46}
    keys = ["prune.optimizer.learning_rate=1e-7", "prune.batch.steps=40", "prune.sparsity_warmup_steps=20"]
    sections = {"source": {"folder": str(learned)}, "target": target}
    with caplog.at_level(logging.WARNING):
        finish(tiny.config(tmp_path / "run", "run.phases=[prune]", *keys, **sections))
    (found,) = [r.getMessage() for r in caplog.records if "destroying" in r.getMessage()]
    assert "masks are destroying" in found and "Most of the rise is from layer:" in found
    assert int(re.findall(r"step (\d+):", found)[0]) < 20 + 8 < 36, "closed at 20, fixed from 36 of 40 on"
