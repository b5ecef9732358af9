"""The published arrays and the two tiny shapes that the tests of this room share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megashear.config.model_shape import ModelShape

FIXTURE = Path(__file__).parent / "fixtures" / "published_masks.npz"
GRANULARITIES = {"head": "group", "intermediate": "intermediate", "layer": "layer", "hidden": "hidden"}


class Published:
    """Arrays by name as float64 tensors; `masks(group)` under our names of granularities."""

    def __init__(self) -> None:
        with np.load(FIXTURE) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[name], dtype=np.float64))

    def masks(self, group: str) -> dict[str, torch.Tensor]:
        return {ours: self[f"{group}/{theirs}"] for theirs, ours in GRANULARITIES.items()}


@pytest.fixture(scope="session")
def published() -> Published:
    return Published()


@pytest.fixture(scope="session")
def source() -> ModelShape:
    """The published arrays' source: multi-head attention."""
    return ModelShape(64, 4, 8, 8, 8, 96, 128)


@pytest.fixture(scope="session")
def target() -> ModelShape:
    return ModelShape(40, 3, 5, 5, 8, 56, 128)


@pytest.fixture(scope="session")
def grouped_source() -> ModelShape:
    """Grouped-query attention: 4 groups of 3 query heads."""
    return ModelShape(16, 3, 12, 4, 4, 20, 11)


@pytest.fixture(scope="session")
def grouped_target() -> ModelShape:
    return ModelShape(10, 2, 6, 3, 4, 12, 11)
