"""The suite itself: groups reach xdist, tiers nest, and a test over its budget fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPENSIVE_TESTS = """
import time
import pytest

def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

@pytest.fixture(scope="session")
def shared():
    burn(0.4)

def test_dear(shared):
    burn(0.4)

@pytest.mark.expensive("says why")
def test_excused():
    burn(0.4)

@pytest.mark.expensive
def test_without_a_reason():
    burn(0.4)

def test_cheap(shared):
    pass
"""
CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from helpers import budget

budget.LIMIT_SECONDS = 0.2
budget.REFERENCE_SECONDS = 1e9  # no machine is slower

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: -")
    config.addinivalue_line("markers", "expensive(reason): -")
    config.pluginmanager.register(budget.Accounting())
"""


def test_groups_reach_xdist(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not distributed")
    assert request.node.nodeid.endswith("@tests/test_tiers.py")


def test_a_test_over_its_budget_fails(tmp_path: Path) -> None:
    """Shared fixtures are charged to no test."""
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=str(ROOT / "tests")))
    (tmp_path / "test_dear.py").write_text(EXPENSIVE_TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_dear.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_dear.py::test_dear" in done.stdout and "mark it expensive(reason)" in done.stdout
    assert "FAILED test_dear.py::test_without_a_reason" in done.stdout
    assert "fixture shared of test_dear.py" in done.stdout
