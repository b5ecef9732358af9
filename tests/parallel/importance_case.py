"""Scores of a drawn model on real text under a layout; called on the ranks of `launch.Ranks` and in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.models import SHAPES, Drawn, build_model
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import ImportanceConfig
from megashear.dataset.dataset_folder import Dataset
from megashear.importance.calibrate import calibrate, calibration_loader
from megashear.importance.principal_basis import residual_stream
from megashear.masks.unit_scores import Scores
from megashear.mixture.loader import Loader
from megashear.planning.calibration_cost import criteria_of

WEIGHTS = {"library": 0.5, "command": 0.3, "help": 0.2}
LENGTH, BATCHES = 24, 3
RUNS = {  # criterion, and that of the layers
    "taylor_mask": "taylor_mask",
    "fisher": "fisher",
    "taylor_weight": "angular_distance",
    "activation": "block_influence",
}


def drawn_shape(name: str, layers: int = 3) -> ModelShape:
    """A shape of `SHAPES` with the vocabulary of the tiny dataset."""
    return replace(SHAPES[name], vocab_size=400, num_layers=layers)


def open_loader(data: Path) -> Loader:
    return calibration_loader(Dataset.open(data), WEIGHTS, LENGTH, 5, False)


def score(
    data: str,
    shape: str,
    parallel: dict[str, Any],
    layers: int = 3,
    sequences: int = 4,
    dtype: str = "float32",
    recompute: bool = False,
) -> dict[str, dict[str, Any]]:
    """The scores of every run of RUNS: {criterion: fields of `Scores`}. sequences: in a calibration batch."""
    source = drawn_shape(shape, layers)
    kind = getattr(torch, dtype)
    layout, chunks = build_model(source, ParallelConfig(**parallel), Drawn(source), kind, recompute)
    found: dict[str, Scores] = {}
    for criterion, layer in RUNS.items():
        criteria = criteria_of(ImportanceConfig(criterion=criterion, layer_criterion=layer), source)
        # 4 sequences are 2 micro-batches for 2 data-parallel ranks, which an interleaved pipeline of 2 can take.
        found[criterion] = calibrate(chunks, layout, open_loader(Path(data)), BATCHES, sequences, criteria)
    assert all(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())
    assert all(parameter.grad is None for chunk in chunks for parameter in chunk.parameters())
    return {name: vars(one) for name, one in found.items()}


def residual_moments(
    data: str, shape: str, parallel: dict[str, Any], layers: int = 3, sequences: int = 4
) -> dict[str, Any]:
    """Covariance [D, D] and peaks [D] of the residual stream."""
    source = drawn_shape(shape, layers)
    layout, chunks = build_model(source, ParallelConfig(**parallel), Drawn(source))
    return vars(residual_stream(chunks, layout, open_loader(Path(data)), BATCHES, sequences))
