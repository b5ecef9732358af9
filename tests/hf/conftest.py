"""Model folders made with the safetensors library alone, so that neither side of a test is ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.inputs import make_llama
from helpers.random_llama import CONFIG, llama_tensors


@pytest.fixture
def make_folder(tmp_path):
    """Factory: a folder of `shards` safetensors files; `change` edits the dict of tensors before it is saved."""

    def make(name="source", dtype=torch.float32, shards=1, change=None, **keys) -> Path:
        config = {**CONFIG, **keys}
        tensors = llama_tensors(config, dtype)
        if change:
            change(tensors)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {tensor: files[i % shards] for i, tensor in enumerate(tensors)}
        for file in files:
            part = {tensor: value for tensor, value in tensors.items() if weight_map[tensor] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


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
