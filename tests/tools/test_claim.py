"""The comparison of the paper's claim, whole, with steps and shapes that take a minute."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from helpers.inputs import TEXTS, make_dataset, make_tokenizer

EXACT = ["--precision", "fp32"]
PATH = Path(__file__).parents[2] / "tools" / "bench" / "claim.py"


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with one small trial."""
    spec = importlib.util.spec_from_file_location("claim", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "claim", module)
    spec.loader.exec_module(module)
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_query_groups": 2, "intermediate_size": 48}
    target = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_query_groups": 1, "intermediate_size": 32}
    trial = module.Trial(
        source=sizes | {"head_dim": 8, "tie_word_embeddings": True},
        target=target,
        source_steps=20,
        rate=1e-3,
        budgets=(0.2,),
        sequence_length=16,
        eval_interval=4,
        eval_sequences=5,
    )
    monkeypatch.setattr(module, "TRIALS", {"tiny": trial})
    return module


@pytest.mark.slow
def test_all_rows_see_equal_tokens_and_are_drawn(claim, tmp_path, monkeypatch, capsys):
    """Every row, two seeds; the second call finds all runs done."""
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.parent.mkdir()
    make_tokenizer(tokenizer, 400)
    make_dataset(tmp_path / "data", tokenizer, TEXTS)
    output = tmp_path / "claim"
    arguments = [str(tmp_path / "data"), str(output), "--seeds", "1,2", *EXACT]
    monkeypatch.setattr(sys, "argv", ["claim.py", "tiny", *arguments])
    claim.main()
    found = json.loads((output / "claim.json").read_text())
    rows = found["budgets"]["0.2"]
    assert set(rows) == set(claim.ROWS)
    assert all("precision: fp32" in path.read_text() for path in output.rglob("*/seed-1/*.yaml"))
    assert rows["one_shot"]["flops"] > rows["directions"]["flops"]
    assert {one["tokens"] for one in rows.values()} == {(4 + 12) * 8 * 16}
    for name, one in rows.items():
        assert set(one["seeds"]) == {"1", "2"} and one["error"] > 0 and one["flops"] > 0, name
        means = [sum(losses.values()) / len(losses) for losses in one["seeds"].values()]
        assert one["loss"] == pytest.approx(sum(means) / 2)
    assert rows["distilled"]["flops"] > rows["untaught"]["flops"] > rows["scratch"]["flops"]
    assert (output / "claim.png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out
    assert "Pruning on 20% of the source's tokens (2 seeds)" in first
    claim.main()
    assert capsys.readouterr().out in first


def test_a_finished_run_is_asked_whether_it_is_this_one(claim, tmp_path, monkeypatch):
    """`megashear run` compares its keys; what it refuses ends the comparison with its message."""
    asked = []
    monkeypatch.setattr(claim, "launch", lambda arguments, *_: asked.append(Path(arguments[1]).read_text()))
    (tmp_path / "source" / "pretrain").mkdir(parents=True)
    (tmp_path / "source" / "pretrain" / "done.json").write_text("{}")
    for steps in (4, 5):
        claim.train("source", {"pretrain": {"batch": {"steps": steps}}}, tmp_path, 1)
        assert f"steps: {steps}" in asked[-1]
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"exit code \d+; .*a\.log ends with: megashear: error: .*cannot be read"):
        claim.launch(["run", str(tmp_path / "nowhere.yaml")], tmp_path / "a.log", 1)


def test_the_source_s_losses_are_of_the_source_that_is_given(claim, tmp_path, monkeypatch):
    def launch(arguments: list[str], *_: object) -> None:
        Path(arguments[-1]).write_text(json.dumps({"losses": {"all": float(arguments[1])}}))

    monkeypatch.setattr(claim, "launch", launch)
    for folder in ("1", "2"):
        losses = claim.source_losses(Path(folder), claim.TRIALS["tiny"], "data", tmp_path, 1)
        assert losses == {"all": float(folder)}


def test_cost_is_the_mean_over_seeds(claim, tmp_path, monkeypatch):
    """Where the teacher goes by what it is outgrown by, seeds cost different FLOPs."""
    cost = {1: 3.0, 2: 5.0}
    monkeypatch.setattr(claim, "record", lambda *_: {"all": 2.0})
    monkeypatch.setattr(claim, "read_run", lambda run: int(run.parent.name.removeprefix("seed-")))
    monkeypatch.setattr(claim, "costs", lambda seed: [SimpleNamespace(flops=cost[seed], teacher_flops=1.0)])
    monkeypatch.setattr(claim, "trained_tokens", lambda spent: 10 * spent[0].flops)
    found = claim.summarise([claim.Case("learned", 0.1, seed) for seed in cost], tmp_path, {"all": 1.5})
    assert (found["0.1"]["learned"]["flops"], found["0.1"]["learned"]["tokens"]) == (5.0, 40.0)


def test_a_row_that_does_not_exist_is_named(claim, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "tiny", "data", str(tmp_path), "--rows", "learned,lerned"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "there is no lerned" in capsys.readouterr().err
