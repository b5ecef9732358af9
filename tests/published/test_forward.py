"""The masked forward pass with given masks, and with the deterministic masks of a given log-alpha."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megashear.config.training_schema import PruneConfig
from megashear.masks.kept_units import kept_units_of

from . import rounding
from .case import ROWS, SOURCE, build_masks, build_model, deviation, logits_of

# The published norm and softmax round to float32 (6e-8), nine norms and four softmaxes deep; in float32 all else too.
TOLERANCE = 1e-6
IN = {torch.float64: TOLERANCE, torch.float32: 2 * TOLERANCE}
GIVEN = ("B", "C/target", "C/expected", "C/binary", "D2")


def mean_loss(logits, tokens):
    """Next-token cross entropy in float64; a row's last position predicts nothing."""
    return float(F.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten()))


def published_loss(arrays, name):
    return float(arrays[f"{name}/ce"] if name == "C/binary" else arrays[f"{name}/losses"][0])


@pytest.mark.parametrize("dtype", IN)
@pytest.mark.parametrize("name", GIVEN)
def test_logits_and_loss_with_the_published_masks(arrays, layout, prune, name, dtype):
    module = build_model(layout, SOURCE, arrays.group("weights"), prune, dtype)
    masks, tokens = arrays.masks(f"{name}/masks", layout.device), arrays["tokens"]
    logits = logits_of(module, tokens, masks)
    assert deviation(logits, arrays[f"{name}/logits"]) < IN[dtype]
    assert mean_loss(logits, tokens) == pytest.approx(published_loss(arrays, name), rel=IN[dtype])
    losses = module(tokens[:, :-1].to(layout.device), tokens[:, 1:].to(layout.device), masks)
    assert losses.shape == (ROWS, tokens.shape[1] - 1)
    assert float(losses.mean()) == pytest.approx(published_loss(arrays, name), rel=TOLERANCE)


@pytest.mark.parametrize("name", GIVEN)
def test_nothing_but_float32_roundings_differ(arrays, layout, prune, name, monkeypatch):
    """With the published roundings in place what is left is the order of float64 sums."""
    if layout.device.type != "cpu" or not rounding.same_bits():
        pytest.skip("this host's float32 softmax has other last bits than the one of the published arrays")
    rounding.put_in_place(monkeypatch)
    module = build_model(layout, SOURCE, arrays.group("weights"), prune)
    logits = logits_of(module, arrays["tokens"], arrays.masks(f"{name}/masks", layout.device))
    assert deviation(logits, arrays[f"{name}/logits"]) < 1e-13
    assert mean_loss(logits, arrays["tokens"]) == pytest.approx(published_loss(arrays, name), rel=1e-13)


def test_the_masking_key_selects_it(arrays, layout, prune):
    """`exact` masking, the default, is another function of soft masks; of 0/1 masks it is the same."""
    assert prune.masking == "published" and PruneConfig().masking == "exact"
    module = build_model(layout, SOURCE, arrays.group("weights"), dataclasses.replace(prune, masking="exact"))
    for name, differs in (("C/target", True), ("C/binary", False)):
        logits = logits_of(module, arrays["tokens"], arrays.masks(f"{name}/masks", layout.device))
        far = deviation(logits, arrays[f"{name}/logits"])
        assert far > 1e-2 if differs else far < TOLERANCE


@pytest.mark.parametrize(
    ("mode", "log_alpha", "name"),
    [
        ("target", "B/log_alpha", "C/target"),
        ("expected", "B/log_alpha", "C/expected"),
        ("target", "D2/log_alpha", "D2"),
    ],
)
def test_deterministic_masks_and_their_logits(arrays, layout, prune, mode, log_alpha, name):
    state = build_masks(arrays, layout, prune, log_alpha, None, torch.float64)
    masks = state.masks.deterministic(mode)
    for kind, theirs in arrays.group(f"{name}/masks").items():
        torch.testing.assert_close(getattr(masks, kind).cpu(), theirs, rtol=0, atol=1e-9)
    module = build_model(layout, SOURCE, arrays.group("weights"), prune)
    assert deviation(logits_of(module, arrays["tokens"], masks), arrays[f"{name}/logits"]) < TOLERANCE


def test_binary_masks_keep_what_the_keep_sets_keep(arrays, layout, prune):
    state = build_masks(arrays, layout, prune, "B/log_alpha", None, torch.float64)
    keep = kept_units_of(state.masks.log_alpha, state.masks.specs, SOURCE)
    for kind, z in arrays.group("C/binary/masks").items():
        rows = z.reshape(-1, z.shape[-1])
        assert ((rows == 0) | (rows == 1)).all()
        assert torch.equal(rows.nonzero()[:, 1].view(len(rows), -1), getattr(keep, kind).view(len(rows), -1))
