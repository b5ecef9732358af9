"""A trace of a few steps by torch.profiler, in Chrome's format: what ran when, on the host and the device.

Key property: nothing is traced, and nothing slowed, before the steps asked for and after them. Read next: `loop.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megashear.files.atomic import atomic_file

FIRST = 2
"""Steps let by first: their allocations and choices of kernels are not those of the others."""


Tick = Callable[[], None]
"""To be called after every step."""


@contextmanager
def traced(path: Path, steps: int) -> Iterator[Tick]:
    """Write the trace of `steps` steps to `path` (NAME.json.gz), fewer where the phase ends before; none where it is 0.

    Raises StorageError where the trace cannot be written.
    """
    if steps == 0:
        yield lambda: None
        return

    def write(profiler: Any) -> None:
        with atomic_file(path) as temporary:
            gzipped = temporary.with_name(f"{temporary.name}.json.gz")  # the end of the name asks for compression
            profiler.export_chrome_trace(str(gzipped))
            gzipped.replace(temporary)

    schedule = torch.profiler.schedule(wait=FIRST - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
