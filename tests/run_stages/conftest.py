"""The tiny inputs and the unbroken run, made once a session; rooms that need them import these fixtures."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from run_stages.tiny import Tiny, finish, results

torch.set_num_threads(1)  # products this small lose by more


@functools.cache
def make_tiny(folder: Path) -> Tiny:
    """One for all rooms: pytest sets up an imported fixture once in each of them."""
    return Tiny(folder)


@functools.cache
def run_unbroken(tiny: Tiny) -> Path:
    """The same for the whole run."""
    finish(tiny.config(tiny.folder / "unbroken"))
    return tiny.folder / "unbroken"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Source, dataset and run files."""
    return make_tiny(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="session")
def unbroken_folder(tiny: Tiny) -> Path:
    """The folder of a whole fp32 run, never stopped; not to be changed."""
    return run_unbroken(tiny)


@pytest.fixture(scope="session")
def unbroken(unbroken_folder: Path) -> dict[str, Any]:
    """What came of it."""
    return results(unbroken_folder)
