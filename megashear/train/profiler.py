"""Trace a few steps with torch.profiler, in Chrome's format (Perfetto reads it).

Steps before and after the traced ones are not slowed down.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megashear.files.atomic import atomic_file
from megashear.train.step import StepResult
from megashear.train.training_phase import Callback, Phase

SKIPPED_STEPS = 2
"""First steps, which are not traced: they allocate memory and select kernels."""


class ProfilerStep(Callback):
    """Advance a profiler after each step."""

    def __init__(self, profiler: torch.profiler.profile) -> None:
        self._profiler = profiler

    def after_step(self, phase: Phase, result: StepResult) -> None:
        """Advance."""
        self._profiler.step()


@contextmanager
def profiler(path: Path, steps: int) -> Iterator[list[Callback]]:
    """Trace `steps` steps to `path` (NAME.json.gz), fewer if the phase ends earlier.

    Yields:
        Callbacks for the training loop; an empty list if `steps` is 0.

    Raises:
        StorageError: The trace cannot be written.
    """
    if steps == 0:
        yield []
        return

    def write(trace: Any) -> None:
        with atomic_file(path) as temporary:
            gzipped = temporary.with_name(f"{temporary.name}.json.gz")  # the suffix selects compression
            trace.export_chrome_trace(str(gzipped))
            gzipped.replace(temporary)

    schedule = torch.profiler.schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, acc_events=True) as running:
        yield [ProfilerStep(running)]
