"""Times on a GPU (or, to try the scripts, on the CPU): contenders in turns, medians, inputs out of the cache."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20
"""Written between two runs: more than the second-level cache of any GPU here, so that inputs come from memory."""


class Clock:
    """Times functions of one device."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        """rounds: of all contenders in turns, after two that do not count."""
        self.device, self.rounds = device, rounds
        self._flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """One run, from an empty queue and with a cache full of other things."""
        self._flush.zero_()
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken: float = begin.elapsed_time(end)
        return taken

    def race(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        """Median milliseconds of everyone and half the distance between the quartiles, as a share of the median."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(self.rounds + 2):
            for name, work in contenders.items():
                taken = self.milliseconds(work)
                if number >= 2:
                    times[name].append(taken)
        found = {}
        for name, all_of_it in times.items():
            low, median, high = statistics.quantiles(all_of_it, n=4)
            found[name] = {"ms": median, "spread": (high - low) / 2 / median}
        return found


def distance(ours: torch.Tensor, right: torch.Tensor) -> float:
    """Relative distance in the 2-norm, in float64."""
    relative: float = ((ours.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30)).item()
    return relative
