"""What all tests share.

Property tests know no deadline: how long an example takes on a busy machine says nothing about what is tested. Where
several processes share the tests, a room goes to one of them: what its tests share is made once.
"""

import gc

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("megashear", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megashear")


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Leave what stands before a file's tests out of garbage collection, as `megashear run` does: one took a second."""
    gc.collect()
    gc.freeze()


APART = {"data", "kernels"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a room's tests together, for `--dist loadgroup`; where its files share nothing dear, each file's."""
    for item in items:
        room = item.path.parent.name
        name = item.path.name if room in APART else room
        item.add_marker(pytest.mark.xdist_group(name))
