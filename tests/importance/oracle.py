"""What every criterion gives, by transformers in float64: its own forward, its autograd, hooks on its modules.

Units are masked by scaling transformers' weights, as finalisation would; values are taken one sequence at a time, and
numpy makes scores of them. Nothing of the package's model, masks or collectives is used.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.models import Drawn
from megashear.config.model_shape import ModelShape

Values = dict[str, dict[str, np.ndarray]]
"""Criterion -> granularity -> value of each unit."""


def llama(shape: ModelShape) -> LlamaForCausalLM:
    """transformers' model in float64 with the weights of `Drawn`; a tied embedding is given twice."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double().eval()
    drawn = Drawn(shape)
    weights = {name: drawn.read(name).double() for name in drawn.shapes}
    if shape.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model.load_state_dict(weights)
    return model


def loss(model: LlamaForCausalLM, tokens: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Mean cross entropy of one sequence [S + 1]."""
    logits = functional_call(model, weights or {}, (tokens[None, :-1],), {"use_cache": False}).logits[0]
    return torch.nn.functional.cross_entropy(logits, tokens[1:])


def masked_weights(model: LlamaForCausalLM, shape: ModelShape, z: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights with units scaled by z, of the shapes that `ones` gives."""
    w = {name: value.detach() for name, value in model.state_dict().items()}
    hidden = z["hidden"]
    w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"] * hidden
    w["model.norm.weight"] = w["model.norm.weight"] * hidden
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w[f"{at}.{norm}.weight"] = w[f"{at}.{norm}.weight"] * hidden
        heads = (z["group"][layer][:, None] * z["query"][layer]).reshape(-1).repeat_interleave(shape.head_dim)
        rows = (z["layer"][layer] * hidden)[:, None]
        w[f"{at}.self_attn.o_proj.weight"] = w[f"{at}.self_attn.o_proj.weight"] * rows * heads
        w[f"{at}.mlp.down_proj.weight"] = w[f"{at}.mlp.down_proj.weight"] * rows * z["intermediate"][layer]
    return w


def ones(shape: ModelShape) -> dict[str, Tensor]:
    layers, groups, queries = shape.num_layers, shape.num_query_groups, shape.queries_per_group
    sizes: dict[str, tuple[int, ...]] = {
        "hidden": (shape.hidden_size,),
        "group": (layers, groups),
        "query": (layers, groups, queries),
        "intermediate": (layers, shape.intermediate_size),
        "layer": (layers,),
    }
    return {name: torch.ones(size, dtype=torch.float64) for name, size in sizes.items()}


def mask_gradients(model: LlamaForCausalLM, shape: ModelShape, tokens: Tensor) -> dict[str, np.ndarray]:
    z = {name: value.requires_grad_() for name, value in ones(shape).items()}
    gradients = torch.autograd.grad(loss(model, tokens, masked_weights(model, shape, z)), list(z.values()))
    return {name: gradient.numpy() for name, gradient in zip(z, gradients, strict=True)}


def of_units(shape: ModelShape, matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over each unit's weights of numbers that stand for the weights; units picked one after another."""
    units = {name: value.zero_().numpy() for name, value in ones(shape).items()}
    d, queries = shape.head_dim, shape.queries_per_group
    for layer in range(shape.num_layers):
        q, k, v, o = (matrices[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkvo")
        gate, up, down = (matrices[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        units["hidden"] += sum(one.sum(0) for one in (q, k, v, gate, up)) + o.sum(1) + down.sum(1)
        units["layer"][layer] = sum(one.sum() for one in (q, k, v, o, gate, up, down))
        for unit in range(shape.intermediate_size):
            units["intermediate"][layer, unit] = gate[unit].sum() + up[unit].sum() + down[:, unit].sum()
        for group in range(shape.num_query_groups):
            for query in range(queries):
                rows = slice((group * queries + query) * d, (group * queries + query + 1) * d)
                units["query"][layer, group, query] = q[rows].sum() + o[:, rows].sum()
            own = slice(group * d, (group + 1) * d)
            units["group"][layer, group] = units["query"][layer, group].sum() + k[own].sum() + v[own].sum()
    return units


def weight_products(model: LlamaForCausalLM, shape: ModelShape, tokens: Tensor) -> dict[str, np.ndarray]:
    model.zero_grad()
    loss(model, tokens).backward()
    products = {name: (weight * weight.grad).abs().detach().numpy() for name, weight in model.named_parameters()}
    return of_units(shape, products)


def activations(model: LlamaForCausalLM, shape: ModelShape, tokens: Tensor) -> dict[str, np.ndarray]:
    """Sizes by granularity, and under `block_influence` and `angular_distance` those of layers."""
    seen: dict[str, list[Any]] = {"norm": [], "head": [], "intermediate": [], "stream": []}
    hooks = []

    def note(module: torch.nn.Module, name: str, take: Callable[..., Tensor]) -> None:
        hooks.append(module.register_forward_hook(lambda _, i, o: seen[name].append(take(i, o).detach().numpy())))

    for layer in model.model.layers:
        note(layer.input_layernorm, "norm", lambda i, o: o[0])
        note(layer.post_attention_layernorm, "norm", lambda i, o: o[0])
        note(layer.self_attn.o_proj, "head", lambda i, o: i[0][0])
        note(layer.mlp.down_proj, "intermediate", lambda i, o: i[0][0])
        note(layer.input_layernorm, "stream", lambda i, o: i[0][0])
    note(model.model.norm, "stream", lambda i, o: i[0][0])
    with torch.no_grad():
        loss(model, tokens)
    for hook in hooks:
        hook.remove()
    heads = [np.linalg.norm(x.reshape(len(x), -1, shape.head_dim), axis=2).mean(0) for x in seen["head"]]
    query = np.stack(heads).reshape(shape.num_layers, shape.num_query_groups, -1)
    cosines = np.stack([cosine(x, y) for x, y in zip(seen["stream"][:-1], seen["stream"][1:], strict=True)])
    return {
        "hidden": np.mean([np.abs(x).mean(0) for x in seen["norm"]], axis=0),
        "query": query,
        "group": query.sum(2),
        "intermediate": np.stack([np.abs(x).mean(0) for x in seen["intermediate"]]),
        "block_influence": 1 - cosines.mean(1),
        "angular_distance": np.arccos(cosines[:, -1]) / math.pi,
    }


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def sequence_values(model: LlamaForCausalLM, shape: ModelShape, tokens: Tensor) -> Values:
    """The value of every unit on one sequence, by every criterion."""
    gradients, sizes = mask_gradients(model, shape, tokens), activations(model, shape, tokens)
    turns = {name: sizes.pop(name) for name in ("block_influence", "angular_distance")}
    return {
        "taylor_mask": {name: np.abs(value) for name, value in gradients.items()},
        "fisher": {name: value**2 for name, value in gradients.items()},
        "taylor_weight": weight_products(model, shape, tokens),
        "activation": {name: value**2 for name, value in sizes.items()},
        **{name: {"layer": value} for name, value in turns.items()},
    }


def scores(values: list[list[Values]], criterion: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Score and standard error from [batch][sequence]: the mean of batch means, or the root of the sum of all."""
    batch_B = np.stack([np.sum([one[criterion][granularity] for one in batch], axis=0) for batch in values])
    spread = batch_B.std(axis=0, ddof=1) / math.sqrt(len(values))
    if criterion != "activation":
        return batch_B.mean(0) / len(values[0]), spread / len(values[0])
    root = np.sqrt(batch_B.sum(0))
    return root, spread * len(values) / (2 * root)


def flat(values: list[list[Values]]) -> Iterator[Values]:
    for batch in values:
        yield from batch
