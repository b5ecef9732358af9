"""Default of `optimizer.learning_rate`."""

from pathlib import Path

import pytest

from helpers.tiny import Tiny, finish, records
from megashear.config.load import load_config
from megashear.config.resolve import peak_learning_rate


@pytest.mark.parametrize(("hidden", "expected"), [(2560, 1e-4), (2048, 1.25e-4), (5120, 5e-5), (256, 1e-3)])
@pytest.mark.parametrize("phase", ["prune", "pretrain"])
def test_default_scales_inversely_with_hidden_size(phase: str, hidden: int, expected: float) -> None:
    """The published rate at hidden size 2560, scaled inversely with the hidden size."""
    optimizer = getattr(load_config(None), phase).optimizer
    assert peak_learning_rate(optimizer, hidden) == pytest.approx(expected, rel=1e-12)


def test_set_rate_is_used() -> None:
    set_rates = ["pretrain.optimizer.learning_rate=0", "prune.preset=paper"]
    config = load_config(None, set_rates)
    assert peak_learning_rate(config.pretrain.optimizer, 64) == 0.0
    assert peak_learning_rate(config.prune.optimizer, 64) == 1e-4  # published, for any hidden size


def test_run_trains_at_default_rate(tiny: Tiny, tmp_path: Path) -> None:
    """Both phases use the target's hidden size 24, although pruning starts with 32."""
    keys = ("learning_rate=null", "warmup_steps=0")
    unset = [f"{phase}.optimizer.{key}" for phase in ("prune", "pretrain") for key in keys]
    config = tiny.config(tmp_path / "run", *unset)
    finish(config)
    found = {one["phase"]: one["lr"] for one in records(tmp_path / "run") if (one["kind"], one["step"]) == ("train", 1)}
    assert found == pytest.approx({"prune": 1e-4 * 2560 / 24, "pretrain": 1e-4 * 2560 / 24}, rel=1e-12)
