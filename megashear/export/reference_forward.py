"""Logits of a model folder by this project's own definition of a LLaMA: plain torch, fp32, tensor by tensor.

The other side of the export's proof (`verify.py`), built from the reference ops and from nothing of transformers.
Shape suffixes: B batch, S positions, D hidden, H query heads, G key/value groups, V vocabulary. Read next: `verify.py`.
"""

import torch
from torch import Tensor

from megashear.ops.reference import apply_rope, attention, rms_norm, rope_tables, swiglu
from megashear.weights import names
from megashear.weights.folder import ModelFolder


def reference_logits(model: ModelFolder, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits [B, S, V] in fp32 of the token ids [B, S].

    dtype: round every weight to it first, as an export of another dtype does; None takes the weights as stored. Besides
    one tensor, the logits themselves are held.
    """
    shape = model.shape

    def weight(name: str) -> Tensor:
        stored = model.read(name)
        return (stored if dtype is None else stored.to(dtype)).float()

    with torch.no_grad():
        ids = ids_BS.reshape(-1)
        rows = torch.stack([model.read_slice(names.EMBEDDING, 0, i, i + 1)[0] for i in ids.tolist()])
        rows = rows if dtype is None else rows.to(dtype)
        x_BSD = rows.float().reshape(*ids_BS.shape, shape.hidden_size)
        tables = rope_tables(shape.head_dim, ids_BS.shape[1], shape.rope_theta, shape.rope_scaling)
        for layer in range(shape.num_layers):
            parts = {part: names.name(layer, part) for part in names.PARTS}
            normed_BSD = rms_norm(x_BSD, weight(parts["input_norm"]), shape.norm_eps)
            q, k, v = (_heads(normed_BSD @ weight(parts[part]).T, shape.head_dim) for part in "qkv")
            out = attention(apply_rope(q, *tables), apply_rope(k, *tables), v)
            x_BSD = x_BSD + out.transpose(1, 2).flatten(2) @ weight(parts["o"]).T
            normed_BSD = rms_norm(x_BSD, weight(parts["post_attention_norm"]), shape.norm_eps)
            gate_up = torch.cat([normed_BSD @ weight(parts[part]).T for part in ("gate", "up")], dim=-1)
            x_BSD = x_BSD + swiglu(gate_up) @ weight(parts["down"]).T
        x_BSD = rms_norm(x_BSD, weight(names.FINAL_NORM), shape.norm_eps)
        return x_BSD @ weight(names.EMBEDDING if shape.tie_word_embeddings else names.OUTPUT).T


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads
