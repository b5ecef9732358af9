"""A LLaMA in thirty lines of plain torch, with masks as the specification writes them: the oracle for folding.

Own arithmetic in the tensors' own width: norms, rotary positions and attention use none of the package's ops.
"""

import torch


def weights(shape, seed=0):
    """Random float64 tensors under Hugging Face names; `lm_head.weight` only where it is not tied."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5

    d, i, dh = shape.hidden_size, shape.intermediate_size, shape.head_dim
    named = {"model.embed_tokens.weight": draw(shape.vocab_size, d), "model.norm.weight": 1 + draw(d)}
    if not shape.tie_word_embeddings:
        named["lm_head.weight"] = draw(shape.vocab_size, d)
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        named |= {f"{at}.{norm}.weight": 1 + draw(d) for norm in ("input_layernorm", "post_attention_layernorm")}
        named[f"{at}.self_attn.q_proj.weight"] = draw(shape.num_heads * dh, d)
        named[f"{at}.self_attn.k_proj.weight"] = draw(shape.num_query_groups * dh, d)
        named[f"{at}.self_attn.v_proj.weight"] = draw(shape.num_query_groups * dh, d)
        named[f"{at}.self_attn.o_proj.weight"] = draw(d, shape.num_heads * dh)
        named |= {f"{at}.mlp.{part}_proj.weight": draw(i, d) for part in ("gate", "up")}
        named[f"{at}.mlp.down_proj.weight"] = draw(d, i)
    return named


def forward(ids, w, shape, masks=None, masking="exact"):
    """Logits [B, S, V]. masks: `Masks` or null for ones."""
    masks = masks if masks is None else {key: value for key, value in vars(masks).items() if value is not None}
    masks = masks or {}
    one = torch.ones((), dtype=torch.float64)
    z = masks.get("hidden", torch.ones(shape.hidden_size, dtype=torch.float64))
    live = z != 0
    gain = (len(z) / int(live.sum())) ** 0.5 if "norm_gain" in masks else 1.0

    def norm(x, weight):
        square = x[..., live].square().mean(-1, keepdim=True)
        return weight * x * torch.rsqrt(square + shape.norm_eps) * z * gain

    x = w["model.embed_tokens.weight"][ids] * (z if masking == "exact" else one)
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        z_layer, z_head = (masks[key][layer] if key in masks else one for key in ("layer", "head"))
        z_intermediate = masks["intermediate"][layer] if "intermediate" in masks else one
        h = norm(x, w[f"{at}.input_layernorm.weight"])
        q, k, v = (split(h @ w[f"{at}.self_attn.{p}_proj.weight"].T, shape.head_dim) for p in "qkv")
        heads = attend(rotate(q, shape), rotate(k, shape), v, shape) * z_head.reshape(-1, 1, 1)
        x = x + z_layer * z * (heads.transpose(1, 2).flatten(2) @ w[f"{at}.self_attn.o_proj.weight"].T)
        m = norm(x, w[f"{at}.post_attention_layernorm.weight"])
        gate, up = (m @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        inner = gate * torch.sigmoid(gate) * up * z_intermediate
        x = x + z_layer * z * (inner @ w[f"{at}.mlp.down_proj.weight"].T)
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def split(x, head_dim):
    """[B, S, heads * dh] -> [B, heads, S, dh]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x, shape):
    half = shape.head_dim // 2
    turn = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * turn
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attend(q, k, v, shape):
    """Query head h reads group h // q."""
    k, v = (t.repeat_interleave(shape.num_heads // shape.num_query_groups, 1) for t in (k, v))
    score = q @ k.transpose(-1, -2) / shape.head_dim**0.5
    future = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
    return score.masked_fill(future, float("-inf")).softmax(-1) @ v
