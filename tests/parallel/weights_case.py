"""Loading and gathering, and vocabulary padding, under a layout; called on the ranks of `launch.Ranks`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.models import SHAPES, Drawn, build_model
from megashear.config.schema import ParallelConfig
from megashear.engine.collectives import gather_objects
from megashear.engine.parallel import gather_logits
from megashear.model.weight_io import RandomWeights, gather_tensors


def gathered(shape: str, parallel: dict[str, Any], random: bool) -> dict[str, Tensor]:
    """Every tensor of a model, loaded from `Drawn` or `RandomWeights`, put together from all ranks."""
    source = RandomWeights(SHAPES[shape], seed=3) if random else Drawn(SHAPES[shape])
    _, chunks = build_model(SHAPES[shape], ParallelConfig(**parallel), source)
    mine = {name: tensor.clone() for chunk in chunks for name, tensor in gather_tensors(chunk)}
    return {name: tensor for one in gather_objects(mine) for name, tensor in one.items()}


def padded(vocabulary: int, tensor: int) -> dict[str, Any]:
    """Logits [S, B, padded V] and losses [B, S] of a model whose vocabulary does not fill the ranks' rows."""
    shape = replace(SHAPES["grouped untied"], vocab_size=vocabulary)
    _, (module,) = build_model(shape, ParallelConfig(tensor=tensor), Drawn(shape))
    tokens_BS = torch.arange(14).remainder(vocabulary).view(2, 7)
    losses_BS = module(tokens_BS, tokens_BS)
    losses_BS.mean().backward()
    gradient = module.output.weight.grad
    rows = max(0, min(len(gradient), vocabulary - module.layout.tensor_rank * len(gradient)))
    return {
        "logits": gather_logits(module(tokens_BS)).detach(),
        "losses": losses_BS.detach(),
        "padding gradients": sum(gather_objects(float(gradient[rows:].abs().sum()))),
    }
