"""Folding: masked logits are the pruned model's; pruned tensors are the published ones but for their defects."""

import dataclasses
import itertools

import pytest
import torch

from masks.masked_llama import forward, weights
from megashear.config.training_schema import PruneConfig
from megashear.errors import ModelError
from megashear.masks.fold import Folding, cut
from megashear.masks.kept_units import kept_units_of
from megashear.masks.mask_optimizer import build_mask_optimizer
from megashear.masks.mask_values import Masks

DTYPE = torch.float64


def fold_of(source, target, seed=0, masking="exact", granularities=None, dtype=DTYPE):
    config = PruneConfig(granularities=granularities)
    state = build_mask_optimizer(source, target, config, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in state.masks.log_alpha.values():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=dtype))
    keep = kept_units_of(state.masks.log_alpha, state.masks.specs, source)
    return Folding(source, keep, state.masks.deterministic(), masking)


def folded(fold, named):
    return dict(pair for name, tensor in named.items() if (pair := fold(name, tensor)) is not None)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masking", ["exact", "published"])
@pytest.mark.parametrize("seed", [0, 1])
def test_masked_logits_are_the_pruned_models(request, grouped, tied, masking, seed):
    names = ("grouped_source", "grouped_target") if grouped else ("source", "target")
    source, target = (dataclasses.replace(request.getfixturevalue(name), tie_word_embeddings=tied) for name in names)
    fold, named = fold_of(source, target, seed, masking), weights(source, seed)
    ids = torch.randint(source.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    masked = forward(ids, named, source, fold.masks, masking)
    pruned = folded(fold, named)
    expected = weights(target)
    assert {name: value.shape for name, value in pruned.items()} == {n: v.shape for n, v in expected.items()}
    torch.testing.assert_close(forward(ids, pruned, target), masked, rtol=0, atol=1e-12)
    assert (masked - forward(ids, named, source)).abs().max() > 0.1


SHRINK = {
    "hidden": {"hidden_size": 10},
    "group": {"num_heads": 9, "num_query_groups": 3},
    "query": {"num_heads": 8},
    "intermediate": {"intermediate_size": 12},
    "layer": {"num_layers": 2},
}


@pytest.mark.parametrize("names", [*itertools.combinations(SHRINK, 1), ("hidden", "query"), ("group", "layer")])
def test_any_granularities_fold_exactly(grouped_source, names):
    target = grouped_source
    for name in names:
        target = dataclasses.replace(target, **SHRINK[name])
    fold, named = fold_of(grouped_source, target), weights(grouped_source)
    ids = torch.arange(11)[None]
    masked = forward(ids, named, grouped_source, fold.masks)
    torch.testing.assert_close(forward(ids, folded(fold, named), target), masked, rtol=0, atol=1e-12)


def published_fold(published, source, target):
    state = build_mask_optimizer(source, target, PruneConfig(basis="source"), seed=0, dtype=DTYPE)
    with torch.no_grad():
        for name, value in published.masks("B/log_alpha_clamped").items():
            state.masks.log_alpha[name].copy_(value)
    return Folding(source, kept_units_of(state.masks.log_alpha, state.masks.specs, source), state.masks.deterministic())


def test_pruned_tensors_match_the_published_ones(published, source, target):
    """Two differ by design: the published output layer carries z_hidden again, and v, not o, carries z_head."""
    fold = published_fold(published, source, target)
    z_hidden = fold.masks.hidden[fold.keep.hidden]
    z_head = fold.masks.head[3][fold.keep.head[3]].repeat_interleave(8)
    names = {
        "embed": ("model.embed_tokens.weight", 1.0),
        "norm": ("model.norm.weight", 1.0),
        "output": ("lm_head.weight", z_hidden),
        "input_norm": ("model.layers.3.input_layernorm.weight", 1.0),
        "v": ("model.layers.3.self_attn.v_proj.weight", z_head[:, None]),
        "o": ("model.layers.3.self_attn.o_proj.weight", 1.0 / z_head),
        "up": ("model.layers.3.mlp.up_proj.weight", 1.0),
        "down": ("model.layers.3.mlp.down_proj.weight", 1.0),
    }
    for short, (name, moved) in names.items():
        new_name, ours = fold(name, published[f"D/full/{short}"])
        assert new_name == name.replace("layers.3", "layers.2")
        torch.testing.assert_close(ours * moved, published[f"D/pruned/{short}"], rtol=0, atol=1e-9, msg=short)


def test_layers_are_dropped_and_renumbered_in_order(grouped_source, grouped_target):
    fold, named = fold_of(grouped_source, grouped_target), weights(grouped_source)
    kept = fold.keep.layer.tolist()
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        pair = fold(name, named[name])
        assert (pair is None) == (layer not in kept)
        if pair is not None:
            assert pair[0] == f"model.layers.{kept.index(layer)}.mlp.gate_proj.weight"


def test_bf16_is_multiplied_wide_and_rounded_once(grouped_source, grouped_target):
    fold = fold_of(grouped_source, grouped_target, dtype=torch.float32)
    layer = int(fold.keep.layer[0])
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    tensor = weights(grouped_source)[name].to(torch.bfloat16)
    masks = Masks(**{key: value.double() for key, value in vars(fold.masks).items() if value is not None})
    _, exact = dataclasses.replace(fold, masks=masks)(name, tensor.double())
    _, ours = fold(name, tensor)
    assert ours.dtype == torch.bfloat16 and ours.is_contiguous()
    # Half a unit in the last of 8 significant bits, and what fp32 adds before.
    assert ((ours.double() - exact).abs() <= exact.abs() * (2**-8 + 2**-21)).all()


def test_a_tied_copy_goes_away_and_unknown_names_are_refused(grouped_source, grouped_target):
    source = dataclasses.replace(grouped_source, tie_word_embeddings=True)
    fold = fold_of(source, grouped_target)
    assert fold("lm_head.weight", torch.zeros(11, 16, dtype=DTYPE)) is None
    for name in ("model.rotary.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.up_proj.bias"):
        kept = name.replace(".0.", f".{int(fold.keep.layer[0])}.")
        with pytest.raises(ModelError, match="not a tensor of a LLaMA"):
            fold(kept, torch.zeros(16, 16))


def test_cut_scales_what_it_keeps():
    matrix = torch.arange(6.0).view(2, 3)
    out = cut(matrix, torch.tensor([1]), torch.tensor([0, 2]), torch.tensor([5.0, 2.0]), torch.tensor([1.0, 9.0, 10.0]))
    assert out.tolist() == [[6.0, 100.0]]
    assert cut(matrix, row_scale=torch.tensor([0.5])).tolist() == (matrix / 2).tolist()
