"""Shared by the tests against the published implementation: its arrays and its settings."""

import pytest

from megashear.config.load import load_config

from .case import Arrays

RUN_FILE = """
prune:
  preset: paper
  batch: {steps: 24}
  sparsity_warmup_steps: 8
  optimizer: {warmup_steps: 4}
"""


@pytest.fixture(scope="session")
def arrays():
    return Arrays()


@pytest.fixture(scope="session")
def prune(tmp_path_factory):
    """The published behaviour, selected as a user selects it; only the schedule is as short as the published trace."""
    path = tmp_path_factory.mktemp("published") / "run.yaml"
    path.write_text(RUN_FILE)
    return load_config(path).prune
