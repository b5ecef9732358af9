"""Tiny random LLaMAs that transformers makes and saves, with a tokenizer that it loads."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def make_llama(tmp_path):
    """Factory: a folder saved by transformers (weights of deviation 0.2, so that attention is far from uniform)."""

    def make(name="source", dtype=torch.float32, max_shard_size="5GB", **keys) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=96,
            max_position_embeddings=128,
            initializer_range=0.2,
            **keys,
        )
        network = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
        network.to(dtype).save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        words = Tokenizer(models.WordLevel({chr(i): i for i in range(95)} | {"<unk>": 95}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
