"""Names and shapes of a LLaMA's tensors, in the order of Hugging Face's state dict.

Shared by reader, writer, parallel model and folding. Weights of linear layers are [out, in].
"""

import re

from megashear.config.model_shape import ModelShape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"

PARTS = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
}
"""Short name of each tensor of a decoder layer, and its Hugging Face name within the layer."""

_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def name(layer: int, part: str) -> str:
    """Full name of a tensor of decoder layer `layer` (from 0); `part` is a key of PARTS."""
    return f"model.layers.{layer}.{PARTS[part]}"


def layer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shape of each part of one decoder layer, keyed as PARTS."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    return {
        "q": (query, hidden),
        "k": (key_value, hidden),
        "v": (key_value, hidden),
        "o": (hidden, query),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "input_norm": (hidden,),
        "post_attention_norm": (hidden,),
    }


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> full shape of every tensor of the model; a tied model has no `lm_head.weight`."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    parts = layer_shapes(shape)
    for layer in range(shape.num_layers):
        shapes.update({name(layer, part): size for part, size in parts.items()})
    shapes[FINAL_NORM] = (shape.hidden_size,)
    if not shape.tie_word_embeddings:
        shapes[OUTPUT] = (shape.vocab_size, shape.hidden_size)
    return shapes


def is_harmless(tensor: str) -> bool:
    """True for buffers that old folders carry and that follow from config.json (rotary frequencies)."""
    return _HARMLESS.fullmatch(tensor) is not None
