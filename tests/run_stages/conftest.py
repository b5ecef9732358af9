"""The tiny inputs and the unbroken run, made once a session; rooms that need them import these fixtures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from run_stages.tiny import Tiny, finish, results

torch.set_num_threads(1)  # products this small lose by more


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Source, dataset and run files."""
    return Tiny(tmp_path_factory.mktemp("tiny") / "inputs")


@pytest.fixture(scope="session")
def unbroken_folder(tiny: Tiny) -> Path:
    """The folder of a whole fp32 run, never stopped; not to be changed."""
    folder = tiny.folder / "unbroken"
    finish(tiny.config(folder))
    return folder


@pytest.fixture(scope="session")
def unbroken(unbroken_folder: Path) -> dict[str, Any]:
    """What came of it."""
    return results(unbroken_folder)
