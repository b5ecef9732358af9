"""Names and sizes are those of transformers' own LLaMA."""

import pytest

from megashear.config.model_shape import ModelShape
from megashear.hf.tensor_names import is_harmless, name, tensor_shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_names_and_sizes_are_transformers(tied, groups):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        network = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=groups,
                head_dim=16,
                intermediate_size=40,
                vocab_size=50,
                tie_word_embeddings=tied,
            )
        )
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if tied:
        expected.pop("lm_head.weight")
    shape = ModelShape(32, 3, 4, groups, 16, 40, 50, tied)
    assert tensor_shapes(shape) == expected
    assert list(tensor_shapes(shape)) == list(expected), "the order decides which shard a tensor goes to"
    assert sum(p.numel() for p in network.parameters()) == shape.parameters()


def test_names_of_parts():
    assert name(3, "gate") == "model.layers.3.mlp.gate_proj.weight"


def test_rotary_buffers_are_harmless_and_biases_are_not():
    assert is_harmless("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert is_harmless("model.rotary_emb.inv_freq")
    assert not is_harmless("model.layers.0.self_attn.q_proj.bias")
