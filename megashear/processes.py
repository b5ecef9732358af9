"""Signals and child processes.

SIGTERM and SIGUSR1 are recorded as a request to stop; the training loop saves a checkpoint and ends. A signal is never
lost, whether it arrives while libraries are loaded, between phases or within a step. Children of a rank end with it.
Imports the standard library only.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType


def end_with_parent() -> None:
    """Have this child process end when its parent has ended, however that came: a killed run leaves none behind.

    For an initializer of a process that `multiprocessing` spawns; raises AssertionError in any other process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.received = number


@contextmanager
def hold_signals() -> Iterator[None]:
    """Keep SIGTERM and SIGUSR1 from the processes that are started within the context; here none of them is lost.

    A signal to the whole process group then stops no helper of a checkpoint that is being written. One to this process
    is noted by the context's end, or a moment later where another thread of it takes the signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # comes with the first process started, and then lets SIGTERM through
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGUSR1 instead of dying of them; the former handlers come back at the end."""
    request = StopRequest()
    previous = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
