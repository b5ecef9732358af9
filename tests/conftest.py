"""Fixtures that all tests share, the tiers, and the CPU time of every test.

Where several processes share the tests, a file's tests stay together, and all tests that need live ranks do: each
process makes what its tests share once.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from helpers import budget

if TYPE_CHECKING:
    from helpers.ranks import Ranks
    from helpers.tiny import Tiny
    from megashear.engine.layout import Layout

# Property tests have no deadline: how long an example takes on a busy machine says nothing about what is tested.
settings.register_profile("megashear", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megashear")

MEDIUM_FIXTURES = {"ranks", "tiny", "emulated", "cuda_device", "cuda_library", "compiled"}
"""Fixtures that start ranks, train, or compile: their tests are left out of the quick tier unless marked quick."""


def pytest_configure(config: pytest.Config) -> None:
    """Account for the CPU time of tests; as a plugin, because hooks of a conftest do not see session fixtures."""
    config.pluginmanager.register(budget.Accounting())


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the quick tier leaves out, and group tests for `--dist loadgroup`."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & MEDIUM_FIXTURES and item.get_closest_marker("quick") is None:
            item.add_marker(pytest.mark.medium)
        group = "ranks" if "ranks" in fixtures else str(item.path.relative_to(item.config.rootpath))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Keep what exists before a file's tests out of garbage collection, as `megashear run` does: one took a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], "Ranks"]]:
    """`ranks(world)`: live ranks of that world size, started once in a session."""
    yield budget.live_ranks
    budget.stop_ranks()


@pytest.fixture(scope="module")
def layout() -> Iterator["Layout"]:
    """A layout of one rank in this process."""
    from megashear.config.schema import ParallelConfig
    from megashear.engine.layout import distributed

    with distributed(ParallelConfig()) as only_rank:
        yield only_rank


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Tiny":
    """Source, dataset and run files of a tiny run."""
    import torch

    from helpers.tiny import Tiny

    torch.set_num_threads(1)  # products this small take longer on more
    return Tiny(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="session")
def unbroken_folder(tiny: "Tiny") -> Path:
    """The folder of a whole fp32 run that was never stopped; not to be changed."""
    from helpers.tiny import finish

    finish(tiny.config(tiny.folder / "unbroken"))
    return tiny.folder / "unbroken"


@pytest.fixture(scope="session")
def unbroken(unbroken_folder: Path) -> dict[str, Any]:
    """The results of that run that must not depend on how often a run is stopped."""
    from helpers.tiny import results

    return results(unbroken_folder)
