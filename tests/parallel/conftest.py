"""One set of ranks per world size for the whole session."""

from collections.abc import Callable, Iterator

import pytest

from parallel.launch import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world)`: the ranks of that world size, started at their first call."""
    started: dict[int, Ranks] = {}
    yield lambda world: started.setdefault(world, Ranks(world))
    for one in started.values():
        one.end_input()
    for one in started.values():
        one.stop()
