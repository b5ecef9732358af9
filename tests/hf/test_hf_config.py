"""config.json <-> ModelShape, with transformers' LlamaConfig as the judge of what a file means."""

import json

import pytest

from megashear.config.model_shape import ModelShape, RopeScaling
from megashear.errors import ModelError
from megashear.hf.hf_config import config_of_shape, read_config, shape_of_config

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GENERATIONS = {
    "bare": {},
    "llama1": {"max_sequence_length": 2048, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    "llama2": {"num_key_value_heads": 4, "rope_scaling": None, "max_position_embeddings": 4096, "pretraining_tp": 1},
    "theta": {"num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "llama3.2": {"head_dim": 32, "rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
    "version5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "head_dim": None},
    "version5 llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "max_position_embeddings": 131072},
}


def as_transformers_reads(config, folder):
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_shape_is_what_transformers_reads(generation, tmp_path):
    config = {**BASE, **GENERATIONS[generation]}
    shape = shape_of_config(config, tmp_path)
    theirs = as_transformers_reads(config, tmp_path)
    rope = theirs.rope_parameters
    assert shape == ModelShape(
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.intermediate_size,
        theirs.vocab_size,
        theirs.tie_word_embeddings,
        rope["rope_theta"],
        RopeScaling(*(rope[key] for key in LLAMA3 if key != "rope_type")) if rope["rope_type"] == "llama3" else None,
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_written_config_means_the_same_to_us_and_to_transformers(generation, tmp_path):
    base = {**BASE, **GENERATIONS[generation], "eos_token_id": [7, 8], "custom": {"kept": True}, "_name_or_path": "x"}
    shape = shape_of_config(base, tmp_path)
    written = config_of_shape(shape, "bfloat16", base)
    assert shape_of_config(written, tmp_path) == shape
    assert written["eos_token_id"] == [7, 8] and written["custom"] == {"kept": True} and "_name_or_path" not in written
    before, after = as_transformers_reads(base, tmp_path), as_transformers_reads(written, tmp_path)
    assert after.rope_parameters == before.rope_parameters
    assert str(after.dtype) == "torch.bfloat16"
    # What transformers 4 reads: top-level rope_theta, and rope_scaling for what is not default.
    assert written["rope_theta"] == shape.rope_theta
    assert (written["rope_scaling"] is None) == (shape.rope_scaling is None)
    assert written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 66}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
    ],
)
def test_what_is_not_carried_is_refused_by_its_key(change, said, tmp_path):
    with pytest.raises(ModelError, match=said.replace(".", r"\.")):
        shape_of_config({**BASE, **change}, tmp_path / "config.json")


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ModelError) as refused:
        shape_of_config({**BASE, "mlp_bias": True, "vocab_size": 0, "rope_theta": -1}, tmp_path / "config.json")
    assert all(key in str(refused.value) for key in ("mlp_bias", "vocab_size", "rope_theta"))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100000, '{"a": "\\ud800"'])
def test_unreadable_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)
