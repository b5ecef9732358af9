"""One rank for the whole room."""

from collections.abc import Iterator

import pytest

from megashear.config.schema import ParallelConfig
from megashear.engine.layout import Layout, distributed


@pytest.fixture(scope="module")
def alone() -> Iterator[Layout]:
    """A layout of one rank."""
    with distributed(ParallelConfig()) as layout:
        yield layout
