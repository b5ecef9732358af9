"""`megashear mixture simulate`: a run's own rule gives its recorded weights; another rule gives others; bad input."""

import json
from pathlib import Path

import pytest

from megashear import cli
from megashear.train.metrics import read_metrics


def simulate(run: Path, output: Path, *overrides: str) -> dict[str, list[dict[str, float]]]:
    """Weights by phase, one a held-out evaluation."""
    assert cli.main(["mixture", "simulate", str(run), *overrides, "--output", str(output)]) == 0
    assert (output / "simulated_weights.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((output / "simulated_weights.json").read_text())
    return {phase: [record["weights"] for record in records] for phase, records in found.items()}


def test_its_own_rule_gives_the_recorded_weights(unbroken_folder: Path, tmp_path: Path) -> None:
    recorded: dict[str, list[dict[str, float]]] = {"prune": [], "pretrain": []}
    for record in read_metrics(unbroken_folder / "metrics.jsonl"):
        if record["kind"] == "eval":
            recorded[record["phase"]].append(record["weights"])
    assert len({json.dumps(weights) for weights in recorded["pretrain"]}) > 1
    assert simulate(unbroken_folder, tmp_path) == recorded


def test_other_rules(unbroken_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    static = simulate(unbroken_folder, tmp_path, "mixture.rule=static")
    assert all(weights == static["prune"][0] for weights in static["prune"] + static["pretrain"])
    schedule = "mixture.schedule={library: [1, 0], command: [1, 1], help: [0, 1]}"
    planned = simulate(unbroken_folder, tmp_path, "mixture.rule=schedule", schedule)
    assert planned["pretrain"][0] == {"library": 0.5, "command": 0.5, "help": 0.0}
    assert planned["pretrain"][-1]["help"] > 0.3
    assert simulate(unbroken_folder, tmp_path, "mixture.rule=ado").keys() == static.keys()
    assert "end, simulated" in capsys.readouterr().out


def test_a_file_of_records_alone(unbroken_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((unbroken_folder / "metrics.jsonl").read_bytes())
    found = simulate(tmp_path / "metrics.jsonl", tmp_path / "out", "mixture.eta=0")
    assert found["pretrain"][-1] == pytest.approx(found["prune"][0])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.seed=3"], "not a key of mixture"),
        (["mixture.rule=adoo"], "did you mean ado?"),
        (["mixture.rule=schedule"], "mixture.schedule names []"),
        (["mixture.initial_weights={library: 1}"], "mixture.initial_weights"),
    ],
)
def test_bad_input(
    unbroken_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str], words: str
) -> None:
    assert cli.main(["mixture", "simulate", str(unbroken_folder), *overrides, "--output", str(tmp_path / "o")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_no_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mixture", "simulate", str(tmp_path)]) == 3
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert cli.main(["mixture", "simulate", str(tmp_path)]) == 3
    assert "no held-out losses" in capsys.readouterr().err
