"""The pruned model: every published pruned tensor but for two documented differences, and the functions they compute.

The published pruned model carries z_hidden in the final norm and again in the output layer, masks the embedding that
its masked model leaves unmasked, and has z_head in v, not o. So its function is not that of its own masked model (0.4
apart in the logits); ours is, under `exact` and under `published` masking.
"""

import dataclasses

import pytest
import torch

from megashear.masks.fold import Folding
from megashear.masks.kept_units import kept_units_of

from .case import SOURCE, TARGET, build_masks, build_model, deviation, logits_of
from .test_forward import TOLERANCE, mean_loss


def fold_of(arrays, layout, prune, group, masking="exact", masks=None):
    """Keep sets and masks from the log-alpha of a group of the fixture."""
    state = build_masks(arrays, layout, prune, f"{group}/log_alpha", None, torch.float64)
    masks = state.masks.deterministic() if masks is None else masks
    return Folding(SOURCE, kept_units_of(state.masks.log_alpha, state.masks.specs, SOURCE), masks, masking)


def folded(fold, arrays):
    pairs = (fold(name, tensor) for name, tensor in arrays.group("weights").items())
    return dict(pair for pair in pairs if pair is not None)


def with_second_factor(pruned, fold):
    """The published output layer: z_hidden once more."""
    z_hidden = fold.masks.hidden.cpu()[fold.keep.hidden]
    return pruned | {"lm_head.weight": pruned["lm_head.weight"] * z_hidden}


def test_every_pruned_tensor_is_the_published_one_but_for_two_factors(arrays, layout, prune):
    fold = fold_of(arrays, layout, prune, "B")
    ours = with_second_factor(folded(fold, arrays), fold)
    theirs = arrays.group("D/pruned")
    assert ours.keys() == theirs.keys()
    for new, layer in enumerate(fold.keep.layer.tolist()):
        z_head = fold.masks.head.cpu()[layer][fold.keep.head[layer]].repeat_interleave(SOURCE.head_dim)
        ours[f"model.layers.{new}.self_attn.v_proj.weight"] *= z_head[:, None]
        ours[f"model.layers.{new}.self_attn.o_proj.weight"] /= z_head
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("group", "pruned"), [("B", "D"), ("D2", "D2")])
def test_with_the_second_factor_the_function_is_the_published_pruned_models(arrays, layout, prune, group, pruned):
    fold = fold_of(arrays, layout, prune, group)
    module = build_model(layout, TARGET, with_second_factor(folded(fold, arrays), fold), prune)
    logits = logits_of(module, arrays["tokens"])
    assert deviation(logits, arrays[f"{pruned}/pruned_logits"]) < TOLERANCE
    assert mean_loss(logits, arrays["tokens"]) == pytest.approx(float(arrays[f"{pruned}/pruned_ce"]), rel=TOLERANCE)


def test_the_published_pruned_tensors_run_here(arrays, layout, prune):
    module = build_model(layout, TARGET, arrays.group("D/pruned"), prune)
    assert deviation(logits_of(module, arrays["tokens"]), arrays["D/pruned_logits"]) < TOLERANCE


@pytest.mark.parametrize(("group", "masked"), [("B", "C/target"), ("D2", "D2")])
def test_our_pruned_model_is_the_published_masked_model(arrays, layout, prune, group, masked):
    """What finalisation should have given: the masked model's logits, which the published pruned model misses."""
    pruned = folded(fold_of(arrays, layout, prune, group, masking=prune.masking), arrays)
    logits = logits_of(build_model(layout, TARGET, pruned, prune), arrays["tokens"])
    assert deviation(logits, arrays[f"{masked}/logits"]) < TOLERANCE
    theirs = arrays["D/pruned_logits" if group == "B" else "D2/pruned_logits"]
    assert (theirs - arrays[f"{masked}/logits"]).abs().max() > (0.3 if group == "B" else 5e-3)


@pytest.mark.parametrize("group", ["B", "D2"])
@pytest.mark.parametrize("masking", ["exact", "published"])
def test_our_masked_and_pruned_models_are_one_function(arrays, layout, prune, group, masking):
    chosen = dataclasses.replace(prune, masking=masking)
    fold = fold_of(arrays, layout, chosen, group, masking)
    masked = build_model(layout, SOURCE, arrays.group("weights"), chosen)
    pruned = build_model(layout, TARGET, folded(fold, arrays), chosen)
    ours = logits_of(pruned, arrays["tokens"])
    torch.testing.assert_close(ours, logits_of(masked, arrays["tokens"], fold.masks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masking", ["exact", "published"])
def test_with_binary_masks_all_models_are_one(arrays, layout, prune, masking):
    """The published pruned logits equal the masked ones to the bit here, and so one array stands for both."""
    masks = arrays.masks("C/binary/masks", layout.device)
    pruned = folded(fold_of(arrays, layout, prune, "B", masking, masks), arrays)
    logits = logits_of(build_model(layout, TARGET, pruned, prune), arrays["tokens"])
    assert deviation(logits, arrays["C/binary/logits"]) < TOLERANCE
    assert mean_loss(logits, arrays["tokens"]) == pytest.approx(float(arrays["C/binary/ce"]), rel=TOLERANCE)
