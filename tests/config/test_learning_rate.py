"""What `optimizer.learning_rate: null` stands for."""

from pathlib import Path

import pytest

from helpers.tiny import Tiny, finish, records
from megashear.config.load import load_config
from megashear.config.resolve import peak_learning_rate


@pytest.mark.parametrize(("hidden", "expected"), [(2560, 1e-4), (2048, 1.25e-4), (5120, 5e-5), (256, 1e-3)])
@pytest.mark.parametrize("phase", ["prune", "pretrain"])
def test_the_default_follows_the_width(phase: str, hidden: int, expected: float) -> None:
    """The published rate at the published width, and inversely to the width elsewhere."""
    optimizer = getattr(load_config(None), phase).optimizer
    assert peak_learning_rate(optimizer, hidden) == pytest.approx(expected, rel=1e-12)


def test_a_rate_that_is_set_stays() -> None:
    set_rates = ["pretrain.optimizer.learning_rate=0", "prune.preset=paper"]
    config = load_config(None, set_rates)
    assert peak_learning_rate(config.pretrain.optimizer, 64) == 0.0
    assert peak_learning_rate(config.prune.optimizer, 64) == 1e-4  # published, whatever the width


def test_a_run_trains_at_the_default(tiny: Tiny, tmp_path: Path) -> None:
    """Both phases make a model of 24 hidden units; the pruning one of its 32 is still whole meanwhile."""
    keys = ("learning_rate=null", "warmup_steps=0")
    unset = [f"{phase}.optimizer.{key}" for phase in ("prune", "pretrain") for key in keys]
    config = tiny.config(tmp_path / "run", *unset)
    finish(config)
    found = {one["phase"]: one["lr"] for one in records(tmp_path / "run") if (one["kind"], one["step"]) == ("train", 1)}
    assert found == pytest.approx({"prune": 1e-4 * 2560 / 24, "pretrain": 1e-4 * 2560 / 24}, rel=1e-12)
