"""The card says what the manifest knows, and nothing that it does not."""

from dataclasses import asdict, replace

from megashear.config.model_shape import ModelShape
from megashear.hf.model_card import model_card

SHAPE = ModelShape(32, 3, 4, 2, 8, 48, 96)


def test_full_provenance():
    source = asdict(replace(SHAPE, hidden_size=64, num_layers=6))
    phases = [
        {"name": "prune", "steps": 3200, "tokens": 419430400, "losses": {"cc": 2.71828, "github": 1.5}},
        {"name": "pretrain", "steps": 48000, "tokens": 50331648000},
    ]
    card = model_card(SHAPE, "bfloat16", {"source": {"path": "llama", "shape": source}, "phases": phases})
    assert "Made by megashear from `llama`" in card
    assert "| hidden size | 32 | 64 |" in card and "| layers | 3 | 6 |" in card
    assert "3,200 steps, 419,430,400 tokens." in card and "50,331,648,000 tokens" in card
    assert "| cc | 2.7183 |" in card and "| github | 1.5000 |" in card
    assert f"{SHAPE.parameters():,} parameters (bfloat16)" in card


def test_units_kept_by_scores_alone():
    phase = {"name": "prune", "method": "one_shot", "steps": 0, "tokens": 0, "calibration_tokens": 65536}
    phase["criteria"] = {"hidden": "activation", "intermediate": "activation", "layer": "block_influence"}
    card = model_card(SHAPE, "float32", {"phases": [phase]})
    assert "(activation, block_influence; 65,536 tokens of text), without training." in card
    assert "0 steps" not in card and "principal" not in card
    assert "among the principal directions" in model_card(SHAPE, "float32", {"phases": [phase | {"principal": True}]})
    assert "fitted to the source by least squares" in model_card(SHAPE, "float32", {"phases": [phase | {"refit": 16}]})
    by_weights = phase | {"criteria": {"hidden": "magnitude"}, "calibration_tokens": 0}
    assert "(magnitude), without training." in model_card(SHAPE, "float32", {"phases": [by_weights]})


def test_absent_keys_are_not_mentioned():
    for provenance in ({}, {"source": None, "phases": None}, {"phases": [{}]}, {"source": {}, "phases": []}):
        card = model_card(SHAPE, "float32", provenance)
        assert card.startswith("---\nlibrary_name: transformers\n") and "| hidden size | 32 |" in card
        assert "None" not in card and "source" not in card and "`" not in card.split("## Use")[0]


def test_an_untrained_copy_does_not_claim_training():
    card = model_card(SHAPE, "float32", {"source": {"path": "llama", "shape": asdict(SHAPE)}})
    assert "without training" in card and "Made by" not in card
