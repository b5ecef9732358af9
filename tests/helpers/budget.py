"""The CPU time of each test, its ranks and child processes included, and the limit that holds in the default tier.

Shared fixtures and the start of shared ranks are charged to no test: `excluded_from_tests` encloses them.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.ranks import Ranks

LIMIT_SECONDS = 10.0
"""CPU-seconds of one test on the reference machine, a core of an AMD EPYC with AVX-512."""
REFERENCE_SECONDS = 0.033
"""CPU-seconds of `_fixed_work` on that machine."""
CPU_PROPERTY, FIXTURE_PROPERTY = "cpu_seconds", "fixture_cpu_seconds"
STARTED: dict[int, Ranks] = {}
"""The live ranks of this process, by world size."""


def slow(*cases: Any) -> list[Any]:
    """Parametrised cases for `--slow` only."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


class Meter:
    """CPU-seconds of this process, its ended children and its live ranks, without what is charged to nobody."""

    def __init__(self) -> None:
        self.excluded, self.depth, self.started = 0.0, 0, 0.0
        self.fixtures: list[tuple[float, str]] = []
        """What was excluded since the last report: CPU-seconds and name."""

    def total(self) -> float:
        """Everything so far, in CPU-seconds."""
        own = os.times()
        ranks = sum(one.cpu_seconds() for one in STARTED.values())
        return own.user + own.system + own.children_user + own.children_system + ranks

    def start(self) -> None:
        """Begin a test."""
        self.started = self.total() - self.excluded

    def spent(self) -> float:
        """CPU-seconds since `start`."""
        return self.total() - self.excluded - self.started


METER = Meter()


@contextlib.contextmanager
def excluded_from_tests(name: str) -> Iterator[None]:
    """Charge to no test what is spent inside; contexts may be nested."""
    before, METER.depth = METER.total(), METER.depth + 1
    try:
        yield
    finally:
        METER.depth -= 1
        if METER.depth == 0:
            spent = METER.total() - before
            METER.excluded += spent
            METER.fixtures.append((spent, name))


def live_ranks(world: int) -> Ranks:
    """The ranks of that world size, started at the first request of this process."""
    if world not in STARTED:
        STARTED[world] = Ranks(world)
    with excluded_from_tests(f"start of {world} ranks"):
        STARTED[world].start()
    return STARTED[world]


def stop_ranks() -> None:
    """End the ranks of all world sizes."""
    for one in STARTED.values():
        one.end_input()
    for one in STARTED.values():
        one.stop()
    STARTED.clear()


@functools.cache
def limit() -> float:
    """The limit of one test in CPU-seconds on this machine: more where it is slower than the reference machine."""
    slowness = min(_fixed_work() for _ in range(3)) / REFERENCE_SECONDS
    return LIMIT_SECONDS * max(1.0, slowness)


def _fixed_work() -> float:
    started, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number % 7
    return time.process_time() - started


class Accounting:
    """Hooks of pytest that measure each test, fail those over the limit, and print the costliest at the end."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        """Charge shared fixtures to no test."""
        if fixturedef.scope == "function":
            return (yield)
        with excluded_from_tests(f"fixture {fixturedef.argname} of {fixturedef.baseid or 'all'}"):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        """Start the meter."""
        METER.start()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Record a test's CPU time, and fail a test that passed but is over the limit."""
        report = yield
        if report.when == "call":
            spent = METER.spent()
            report.user_properties += [(CPU_PROPERTY, spent), (FIXTURE_PROPERTY, METER.fixtures)]
            METER.fixtures = []
            excused = [mark for mark in item.iter_markers("expensive") if mark.args and str(mark.args[0]).strip()]
            if report.passed and spent > limit() and not excused and not any(item.iter_markers("slow")):
                report.outcome = "failed"
                report.longrepr = (
                    f"the test used {spent:.1f} CPU-seconds, its ranks and child processes included (limit of the "
                    f"default tier on this machine: {limit():.0f}); make it cheaper, mark it slow, or mark it "
                    "expensive(reason)"
                )
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the twenty costliest tests and shared fixtures."""
        costs = []
        for kind in ("passed", "failed"):
            for report in terminalreporter.stats.get(kind, []):
                if report.when == "call":
                    properties = dict(report.user_properties)
                    costs.append((properties[CPU_PROPERTY], report.nodeid.partition("@")[0]))
                    costs += [(spent, name) for spent, name in properties[FIXTURE_PROPERTY]]
        if costs:
            terminalreporter.section("costliest tests and shared fixtures")
            terminalreporter.write_line("  CPU s  name")
            for spent, name in sorted(costs, reverse=True)[:20]:
                terminalreporter.write_line(f"{spent:7.1f}  {name}")
