"""SIGTERM and SIGUSR1 to `megashear run`, as schedulers send them: exit code 75, and the same command goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import Tiny, differing, finish, results

TESTS = Path(__file__).resolve().parents[1]


def start(file: Path) -> "subprocess.Popen[str]":
    """The command, in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-m", "megashear", "run", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.medium
@pytest.mark.expensive("two processes that are stopped, and a run to compare with")
def test_a_signal_to_the_process_group(tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any]) -> None:
    """To one that starts; while it prunes to the group, as `timeout` and schedulers do: a checkpoint's helpers too."""
    folder = tmp_path / "run"
    process = start(tiny.file(folder))
    wait_for((folder / ".lock").exists, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 75 and re.search("before prune|after step 0", errors), errors
    process = start(tiny.file(folder))
    wait_for((folder / "prune/step-00000004").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 75, errors
    assert len([line for line in errors.splitlines() if line.startswith("megashear: error: interrupted by")]) == 1
    assert re.search("after step [4-8] of prune|before finalize", errors), errors
    assert "Traceback" not in errors
    finish(tiny.config(folder))
    assert differing(results(folder), unbroken) == []


@pytest.mark.slow
def test_signals_at_several_moments(tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any]) -> None:
    """While it starts, while it prunes (to the whole group, as `timeout` and schedulers do), while it pre-trains."""
    folder = tmp_path / "run"
    file = tiny.file(folder)
    moments: list[tuple[int, Callable[[int, int], None], Callable[[], bool], str]] = [
        (signal.SIGUSR1, os.kill, (folder / ".lock").exists, "before prune|after step 0"),
        (
            signal.SIGTERM,
            os.killpg,
            (folder / "prune/step-00000004").exists,
            "after step [4-8] of prune|before finalize",
        ),
        (signal.SIGUSR1, os.kill, (folder / "pretrain/step-00000004").exists, "after step [4-6] of pretrain"),
    ]
    for number, send, condition, words in moments:
        process = start(file)
        wait_for(condition, process)
        send(process.pid, number)
        _, errors = process.communicate(timeout=240)
        if words.startswith("after step [4-6]") and process.returncode == 0:
            break  # the last steps were done before the signal came
        assert process.returncode == 75, errors
        assert len([line for line in errors.splitlines() if line.startswith("megashear: error: interrupted by")]) == 1
        assert re.search(words, errors), errors
        assert "Traceback" not in errors
    process = start(file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert differing(results(folder), unbroken) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3 * n for n in range(1, 21)])
def test_a_signal_at_any_moment(tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any], delay: float) -> None:
    """From the first module on that listens: either the run was done, or it says that the same command goes on."""
    file = tiny.file(tmp_path / "run")
    process = start(file)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (75, 0, -signal.SIGTERM) and "Traceback" not in errors
    process = start(file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert differing(results(tmp_path / "run"), unbroken) == []
