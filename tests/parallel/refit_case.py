"""Fitting a drawn model to its cut on real text under a layout; called on the ranks of `launch.Ranks` and alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.models import TARGETS, Drawn, build_model
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.engine.collectives import gather_objects
from megashear.engine.layout import Layout
from megashear.engine.parallel import transformer_config
from megashear.importance.least_squares_fit import refit
from megashear.masks.mask_specs import mask_specs
from megashear.masks.mask_values import Masks
from megashear.masks.unit_scores import open_units
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches
from megashear.model.weight_io import filled_chunks, gather_tensors
from parallel.importance_case import BATCHES, drawn_shape, open_loader


def target_of(shape: str, layers: int) -> ModelShape:
    """The shape that is cut to: half of the hidden units, the groups and the intermediate units, a layer less."""
    return replace(TARGETS[shape], vocab_size=400, num_layers=layers - 1)


def drawn_scores(shape: str, layers: int) -> dict[str, Tensor]:
    """Scores without a meaning, by granularity; the middle layer goes."""
    source, generator = drawn_shape(shape, layers), torch.Generator().manual_seed(7)
    specs = mask_specs(source, target_of(shape, layers))
    scores = {spec.name: torch.rand(spec.shape, generator=generator) for spec in specs}
    scores["layer"][layers // 2] = -1.0
    return scores


def kept_masks(shape: str, layers: int, device: torch.device | str = "cpu") -> Masks:
    """Masks of what the drawn scores keep, with a norm gain, as of principal directions."""
    source = drawn_shape(shape, layers)
    specs = mask_specs(source, target_of(shape, layers))
    return open_units(drawn_scores(shape, layers), specs, source, principal=True).to(device)


def fitted(data: str, shape: str, parallel: dict[str, Any], layers: int = 3, sequences: int = 4) -> dict[str, Tensor]:
    """Every tensor of the fitted model, put together from all ranks. sequences: in a calibration batch."""

    def read(layout: Layout) -> list[MicroBatch]:
        loader, rows, batches = open_loader(Path(data)), local_rows(sequences, layout, 1).numpy(), []
        for _ in range(BATCHES):
            samples, _ = loader.read(loader.stream.next_batch(sequences), rows)
            batches += micro_batches(samples, layout, 1, layout.device)
        return batches

    return fitted_to(read, shape, parallel, layers)


def fitted_to(
    read: Callable[[Layout], list[MicroBatch]], shape: str, parallel: dict[str, Any], layers: int = 3
) -> dict[str, Tensor]:
    """The same, of text that `read` gives."""
    source_shape, how = drawn_shape(shape, layers), ParallelConfig(**parallel)
    layout, source = build_model(source_shape, how, Drawn(source_shape))
    core = transformer_config(source_shape, how, torch.float32)
    pruned = filled_chunks(source_shape, core, layout, Drawn(source_shape))
    before = {name: value.clone() for chunk in source for name, value in chunk.named_parameters()}
    told: list[int] = []
    refit(source, pruned, layout, kept_masks(shape, layers, layout.device), read(layout), told.append)
    assert told == list(range(1, layers + 1))
    assert all(torch.equal(before[name], value) for chunk in source for name, value in chunk.named_parameters())
    mine = {name: tensor.clone() for chunk in pruned for name, tensor in gather_tensors(chunk)}
    return {name: tensor for one in gather_objects(mine) for name, tensor in one.items()}
