"""The comparison of the paper's claim, whole, with steps and shapes that take a minute."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from run_stages.tiny import TEXTS, make_dataset, make_tokenizer

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
        source_steps=8,
        prune_steps=4,
        pretrain_steps=4,
        rate=1e-3,
        sequence_length=16,
        eval_interval=4,
        eval_sequences=5,
    )
    monkeypatch.setattr(module, "TRIALS", {"tiny": trial})
    return module


@pytest.mark.slow
def test_all_rows_see_equal_tokens_and_are_drawn(claim, tmp_path, monkeypatch, capsys):
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.parent.mkdir()
    make_tokenizer(tokenizer, 400)
    make_dataset(tmp_path / "data", tokenizer, TEXTS)
    output = tmp_path / "claim"
    monkeypatch.setattr(sys, "argv", ["claim.py", "tiny", str(tmp_path / "data"), str(output)])
    claim.main()
    found = json.loads((output / "claim.json").read_text())
    assert set(found["losses"]) == {"source", *claim.ROWS} and set(found["spread"]) == set(claim.ROWS)
    assert found["parameters"]["source"] > 1.5 * found["parameters"]["target"]
    tokens = {}
    for row in claim.ROWS:
        summary = json.loads((output / row / "summary.json").read_text())
        assert summary["parameters"]["final"] == found["parameters"]["target"]
        tokens[row] = sum(summary["tokens"].values())
    assert len(set(tokens.values())) == 1, tokens
    assert (output / "claim.png").stat().st_size > 10_000
    assert all(name in capsys.readouterr().out for name in ("mean excess",))


def test_a_source_is_asked_for_where_the_trial_trains_none(claim, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "tiny", "data", "out", "--source", "model"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "trains its own source" in capsys.readouterr().err
