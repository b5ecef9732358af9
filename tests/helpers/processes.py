"""Processes that a killed one may leave behind: they keep its session."""

import contextlib
import time
from pathlib import Path


def live_processes(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = entry.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(entry.parent.name))
    return found


def processes_of(session: int, seconds: float = 30.0) -> list[int]:
    """Those of a session that are still there after the ones that are ending have had some seconds."""
    deadline = time.monotonic() + seconds
    while (found := live_processes(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
