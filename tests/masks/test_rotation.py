"""A rotated model computes what transformers computes of the model as it was."""

from dataclasses import replace

import pytest
import torch

from helpers.models import SHAPES
from importance.oracle import llama
from megashear.masks.rotation import Rotation

TOLERANCE = 1e-6
"""Of the largest logit: transformers' norms are computed in fp32 whatever the model's dtype."""


@pytest.mark.parametrize("name", ["multi-head", "grouped untied"])
def test_logits_stay(name: str) -> None:
    shape = replace(SHAPES[name], num_layers=2)
    model = llama(shape)
    with torch.no_grad():
        for tensor, weight in model.named_parameters():
            if "norm" in tensor:
                weight.mul_(0.3)
    source = {tensor: weight.detach().clone() for tensor, weight in model.named_parameters()}
    tokens = torch.randint(shape.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(tokens).logits
        basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(4)).double()).Q
        rotation = Rotation(basis, source.__getitem__)
        rotated = {tensor: rotation(tensor) for tensor in source}
        model.load_state_dict(rotated)
        after = model(tokens).logits
    assert (after - before).abs().max() <= TOLERANCE * before.abs().max()
    assert (rotated["lm_head.weight"] - source["lm_head.weight"]).abs().max() > 0.1
    for norm in (tensor for tensor in source if "norm" in tensor):
        size = rotated[norm][0]
        assert (rotated[norm] == size).all() and size == size.bfloat16().to(size), norm
        assert abs(size / source[norm].square().mean().sqrt() - 1) <= 2**-8, norm


def test_a_norm_of_zeros_stays_one() -> None:
    zeros = {"model.norm.weight": torch.zeros(4), "lm_head.weight": torch.ones(3, 4)}
    rotation = Rotation(torch.eye(4, dtype=torch.float64), zeros.__getitem__)
    assert (rotation("model.norm.weight") == 1).all() and (rotation("lm_head.weight") == 0).all()
