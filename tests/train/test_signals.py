"""Signals are noted, held back where they must be, and left as they were."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megashear.processes import SIGNALS, StopRequest, hold_signals, stop_on_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def _noted(stop: StopRequest) -> int | None:
    """What was received within ten seconds: another thread may take the signal, in its own time."""
    end = time.monotonic() + 10
    while stop.received is None and time.monotonic() < end:
        time.sleep(0.001)
    return stop.received


@pytest.mark.parametrize("number", SIGNALS)
def test_a_held_signal_is_not_lost_and_spares_children(number: int) -> None:
    with stop_on_signals() as stop:
        with hold_signals():
            child = subprocess.Popen([sys.executable, "-c", "input(); print('alive')"], stdin=-1, stdout=-1, text=True)
            child.send_signal(number)
            os.kill(os.getpid(), number)
        assert _noted(stop) == number
        assert child.communicate("\n")[0] == "alive\n"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)


def test_listening_needs_no_torch() -> None:
    code = "import sys, megashear.processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GROUP = """
import multiprocessing, os, signal, time
from megashear.processes import SIGNALS, hold_signals, stop_on_signals
with stop_on_signals() as stop:
    with hold_signals():
        queue = multiprocessing.get_context("spawn").Manager().Queue()
    for number in SIGNALS:
        os.killpg(0, number)
        time.sleep(0.3)
        queue.put(number)
        assert queue.get() == stop.received == number
"""


def test_a_signal_to_the_group_spares_what_writes_checkpoints() -> None:
    """megatron-core's helper is a process of this kind: it must outlive the signal that asks for a last checkpoint."""
    done = subprocess.run([sys.executable, "-c", GROUP], capture_output=True, start_new_session=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
