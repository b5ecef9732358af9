"""Describe which rows or columns of which Hugging Face tensor each parameter of a rank holds.

Used for loading, saving and checkpoint names. A parameter is a list of `Piece`s, stacked along dimension 0, or a slice
of columns. Fused rows are described in `transformer_layer.py`.
"""

from dataclasses import dataclass

from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout

EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """Rows or columns start .. stop of a Hugging Face tensor; `padding` rows of zeros follow (vocabulary padding)."""

    name: str
    dim: int
    start: int
    stop: int
    padding: int = 0


def layer_name(layer: int, part: str) -> str:
    """Hugging Face's name of a layer's weight, for instance part `self_attn.q_proj`."""
    return f"model.layers.{layer}.{part}.weight"


def qkv_pieces(shape: ModelShape, layout: Layout, layer: int) -> list[Piece]:
    """The rank's rows of the fused [G, q + 2, d] product; where ranks share a group they cut it at equal rows."""
    q, d = shape.queries_per_group, shape.head_dim
    rows = shape.num_query_groups * (q + 2) * d // layout.tensor_size
    low, high = layout.tensor_rank * rows, (layout.tensor_rank + 1) * rows
    pieces = []
    for group in range(shape.num_query_groups):
        base = group * (q + 2) * d
        parts = (("q_proj", base, group * q * d, q * d), ("k_proj", base + q * d, group * d, d))
        for part, offset, first, count in (*parts, ("v_proj", base + (q + 1) * d, group * d, d)):
            start, stop = max(low, offset), min(high, offset + count)
            if start < stop:
                name = layer_name(layer, f"self_attn.{part}")
                pieces.append(Piece(name, 0, first + start - offset, first + stop - offset))
    return pieces


def layer_pieces(shape: ModelShape, layout: Layout, layer: int) -> dict[str, list[Piece]]:
    """Pieces of every parameter of one decoder layer, by its name within the layer."""

    def share(size: int) -> tuple[int, int]:
        part = size // layout.tensor_size
        return layout.tensor_rank * part, (layout.tensor_rank + 1) * part

    columns = share(shape.intermediate_size)
    return {
        "attention_norm.weight": [Piece(layer_name(layer, "input_layernorm"), 0, 0, shape.hidden_size)],
        "attention.qkv.weight": qkv_pieces(shape, layout, layer),
        "attention.out.weight": [
            Piece(layer_name(layer, "self_attn.o_proj"), 1, *share(shape.num_heads * shape.head_dim))
        ],
        "mlp_norm.weight": [Piece(layer_name(layer, "post_attention_layernorm"), 0, 0, shape.hidden_size)],
        "mlp.gate_up.weight": [
            Piece(layer_name(layer, "mlp.gate_proj"), 0, *columns),
            Piece(layer_name(layer, "mlp.up_proj"), 0, *columns),
        ],
        "mlp.down.weight": [Piece(layer_name(layer, "mlp.down_proj"), 1, *columns)],
    }


def vocab_piece(shape: ModelShape, layout: Layout, name: str) -> Piece:
    """The rank's rows of the embedding or the output layer, and the padding rows behind them."""
    rows = shape.padded_vocab_size(layout.tensor_size) // layout.tensor_size
    start = min(layout.tensor_rank * rows, shape.vocab_size)
    stop = min(start + rows, shape.vocab_size)
    return Piece(name, 0, start, stop, padding=rows - (stop - start))


def chunk_pieces(shape: ModelShape, layout: Layout, layers: range, pre: bool, post: bool) -> dict[str, list[Piece]]:
    """Pieces of every parameter of a model chunk, by the parameter's name in `Llama`."""
    pieces: dict[str, list[Piece]] = {}
    for layer in layers:
        pieces |= {f"layers.{layer}.{name}": value for name, value in layer_pieces(shape, layout, layer).items()}
    if pre:
        pieces["embedding.weight"] = [vocab_piece(shape, layout, EMBEDDING)]
    if post:
        pieces["norm.weight"] = [Piece(FINAL_NORM, 0, 0, shape.hidden_size)]
        if not shape.tie_word_embeddings:
            pieces["output.weight"] = [vocab_piece(shape, layout, OUTPUT)]
        elif not pre:
            pieces["output.weight"] = [vocab_piece(shape, layout, EMBEDDING)]
    return pieces
