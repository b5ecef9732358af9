"""What a training phase writes down, in which order; stops and resumes are proved in `run_phases/test_resume.py`."""

from pathlib import Path

import pytest

from helpers.tiny import SEQUENCE, records
from megashear.config.load import load_config
from megashear.config.resolve import peak_learning_rate
from megashear.train.learning_rate import PRETRAIN_WARMUP_SHARE, PRUNE_WARMUP_SHARE, learning_rate_factor


def test_records_stand_in_order(unbroken_folder: Path) -> None:
    """The start's evaluation, then for each step its records, then its evaluation; one at the end in any case."""
    expected = [("prune", 0, "eval")]
    for step in range(1, 9):
        expected += [("prune", step, "train"), ("prune", step, "mask")]
        expected += [("prune", step, "eval")] if step in (3, 6, 8) else []
    expected += [("pretrain", 0, "eval")]
    for step in range(1, 7):
        expected += [("pretrain", step, "train")]
        expected += [("pretrain", step, "eval")] if step in (2, 4, 6) else []
    assert [(one["phase"], one["step"], one["kind"]) for one in records(unbroken_folder)] == expected


@pytest.mark.parametrize(("phase", "share"), [("prune", PRUNE_WARMUP_SHARE), ("pretrain", PRETRAIN_WARMUP_SHARE)])
def test_numbers_of_the_records(unbroken_folder: Path, phase: str, share: float) -> None:
    config = load_config(unbroken_folder / "config.yaml")
    section = getattr(config, phase)
    for one in records(unbroken_folder):
        if (one["phase"], one["kind"]) != (phase, "train"):
            continue
        step = one["step"]
        factor = learning_rate_factor(step - 1, section.batch.steps, section.optimizer, share)
        assert one["lr"] == factor * peak_learning_rate(section.optimizer, 24)
        assert one["tokens"] == step * section.batch.global_batch * SEQUENCE == sum(one["domain_tokens"].values())
        assert one["skipped"] == 0 and one["loss"] > 0 and one["grad_norm"] > 0


def test_sparsity_grows_to_its_target(unbroken_folder: Path) -> None:
    """The target grows over half of the steps, here four, and stays; what is expected is on it, settled at the end."""
    masks = [one for one in records(unbroken_folder) if one["kind"] == "mask"]
    final = {"hidden": 1 - 24 / 32, "layer": 1 - 2 / 5, "intermediate": 1 - 32 / 48}
    for number, one in enumerate(masks):
        wanted = {name: value * min(1.0, number / 4) for name, value in final.items()}
        assert {name: one["target"][name] for name in final} == pytest.approx(wanted)
        assert {name: one["expected"][name] for name in final} == pytest.approx(wanted, abs=1e-5 if number else 2e-3)
    assert {name: masks[-1]["expected"][name] for name in final} == pytest.approx(final, abs=2e-6)
