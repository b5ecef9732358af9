"""A small GGUF file, written by the `gguf` package, becomes the LLaMA that it was made from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TOOL = Path(__file__).parents[2] / "tools/gguf_to_hf.py"
HIDDEN, HEADS, GROUPS, INNER = 64, 4, 2, 96
BLOCK = {
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (HIDDEN // 2, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (HIDDEN // 2, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
}


def interleaved(weight, heads):
    """The row order of rotary pairs that GGUF keeps for LLaMA: (i, i + half) of a head become neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def byte_tokens():
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "12", "ab"]


def write_gguf(path):
    tokens = byte_tokens()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2", "a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    torch.manual_seed(0)
    expected = {"model.embed_tokens.weight": torch.randn(len(tokens), HIDDEN), "model.norm.weight": torch.randn(HIDDEN)}
    writer.add_tensor("token_embd.weight", expected["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", expected["model.norm.weight"].numpy())
    for name, (ours, shape) in BLOCK.items():
        weight = expected[f"model.layers.0.{ours}.weight"] = torch.randn(shape)
        heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(name)
        writer.add_tensor(f"blk.0.{name}.weight", (interleaved(weight, heads) if heads else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_a_gguf_llama_becomes_a_model_folder(tmp_path):
    from megashear.hf.model_folder import ModelFolder

    expected = write_gguf(tmp_path / "small.gguf")
    done = run(tmp_path / "small.gguf", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model = ModelFolder.open(tmp_path / "out", digests=True)
    assert set(model.tensors) == set(expected) and model.shape.tie_word_embeddings
    assert (model.shape.num_query_groups, model.shape.rope_theta, model.dtype) == (GROUPS, 1e5, torch.float32)
    assert all(torch.equal(model.read(name), expected[name]) for name in expected)
    assert "quantization_config" not in model.config and model.digest() in done.stdout


def test_digits_are_split(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "small.gguf")
    assert run(tmp_path / "small.gguf", tmp_path / "out", "--dtype", "bfloat16").returncode == 0
    tokens = byte_tokens()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("12ab 12").input_ids
    assert [tokens[i] for i in ids] == ["1", "2", "ab", "\u0120", "1", "2"]


def test_refusals_end_in_one_line(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "small.gguf").read_bytes()[:3000])
    for source, output, said in (
        ("absent.gguf", "new", "no such file"),
        ("small.gguf", "out", "exists"),
        ("broken.gguf", "new", "cannot be read as GGUF"),
    ):
        done = run(tmp_path / source, tmp_path / output)
        assert done.returncode == 4 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
