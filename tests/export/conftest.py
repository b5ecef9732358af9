"""Tiny random LLaMAs that transformers makes and saves, with a tokenizer that it loads."""

from pathlib import Path

import pytest
import torch

from helpers.inputs import make_llama

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


@pytest.fixture
def llama_folder(tmp_path):
    """Factory: a folder saved by transformers (weights of deviation 0.2, so that attention is far from uniform)."""

    def make(name="source", dtype=torch.float32, max_shard_size="5GB", **keys) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        config = {**SIZES, **keys}
        make_llama(tmp_path / name, seed=0, norms=True, dtype=dtype, max_shard_size=max_shard_size, **config)
        words = Tokenizer(models.WordLevel({chr(i): i for i in range(95)} | {"<unk>": 95}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
