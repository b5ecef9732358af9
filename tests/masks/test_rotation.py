"""A rotated model computes what transformers computes of the model as it was."""

from dataclasses import replace

import pytest
import torch
from importance.oracle import llama
from parallel.models import SHAPES, Drawn

from megashear.masks.rotation import Rotation

TOLERANCE = 1e-6
"""Of the largest logit: transformers' norms are computed in fp32 whatever the model's dtype."""


@pytest.mark.parametrize("name", ["multi-head", "grouped untied"])
def test_logits_stay(name: str) -> None:
    shape = replace(SHAPES[name], num_layers=2)
    model = llama(shape)
    tokens = torch.randint(shape.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(tokens).logits
        basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(4)).double()).Q
        rotation = Rotation(basis, Drawn(shape).read)
        rotated = {tensor: rotation(tensor) for tensor in Drawn(shape).shapes}
        model.load_state_dict(rotated)
        after = model(tokens).logits
    assert (after - before).abs().max() <= TOLERANCE * before.abs().max()
    assert all(torch.equal(one, torch.ones_like(one)) for tensor, one in rotated.items() if "norm" in tensor)
    assert (rotated["lm_head.weight"] - Drawn(shape).read("lm_head.weight")).abs().max() > 0.1
