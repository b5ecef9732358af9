"""transformers on the same folder: the logits and the greedy tokens that every layout has to give."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from helpers.inputs import make_llama


def transformers_greedy(folder: Path, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Logits [prompt, V] in fp32 and greedy tokens, by `generate` with its key/value cache and without a stop token."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    tokens_BS = torch.tensor([prompt])
    with torch.no_grad():
        logits_SV = model(tokens_BS).logits[0]
        out_BS = model.generate(
            tokens_BS, attention_mask=torch.ones_like(tokens_BS), do_sample=False, max_new_tokens=new_tokens
        )
    return {"logits": logits_SV, "tokens": out_BS[0, len(prompt) :].tolist()}


def save_random_llama(folder: Path, **changes: Any) -> None:
    """A tiny random LLaMA written by transformers, its weights large enough that logits and attention differ."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96} | changes
    make_llama(folder, seed=0, norms=True, vocab_size=131, max_position_embeddings=512, **sizes)
