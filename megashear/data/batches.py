"""The batches of a rank in the order of the blended stream, read ahead of the step that needs them.

Key properties: what is read ahead is planned by a copy of the stream, and used only where the stream itself then plans
the same; so neither the order nor the state knows of it, and a change of the weights costs one batch read anew. Read
next: `loader.py`, `blend.py`.
"""

import copy
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megashear.data.blend import BatchPlan, BlendedStream
from megashear.data.loader import Loader
from megashear.errors import TrainingError


class Batches:
    """Gives a rank's rows of one global batch after another. Close it when done."""

    def __init__(
        self, loader: Loader, rows: np.ndarray, global_batch: int, ahead: int = 0, pinned: bool = False
    ) -> None:
        """rows: this rank's, of each global batch; ahead: batches read before they are asked for, by as many threads.

        pinned: into memory from which a GPU copies while it computes.
        """
        self.loader, self.rows, self.global_batch, self.ahead = loader, rows, global_batch, ahead
        self._pinned = pinned
        self._pool = ThreadPoolExecutor(ahead, "read ahead") if ahead else None
        self._planner: BlendedStream | None = None
        self._read: deque[tuple[BatchPlan, Future[torch.Tensor]]] = deque()

    def next(self) -> tuple[BatchPlan, torch.Tensor]:
        """The next plan of the loader's stream, which moves on, and the tokens [rows, S + 1] of this rank.

        Raises what `BlendedStream.next_batch` and the reading of the dataset raise.
        """
        plan = self.loader.stream.next_batch(self.global_batch)
        samples = self._take(plan)
        self._read_on()
        return plan, samples

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, plan: BatchPlan) -> torch.Tensor:
        if self._read:
            planned, future = self._read.popleft()
            if planned.same(plan):
                return future.result()
            future.cancel()
            for _, other in self._read:
                other.cancel()
            self._read.clear()
        self._planner = None
        return self._samples(plan)

    def _read_on(self) -> None:
        if self._pool is None:
            return
        if self._planner is None:
            self._planner = copy.deepcopy(self.loader.stream)
        while len(self._read) < self.ahead:
            try:
                plan = self._planner.next_batch(self.global_batch)
            except TrainingError:  # no data is left: the stream itself will say so, where it comes to that
                return
            self._read.append((plan, self._pool.submit(self._samples, plan)))

    def _samples(self, plan: BatchPlan) -> torch.Tensor:
        samples, _ = self.loader.read(plan, self.rows)
        return samples.pin_memory() if self._pinned else samples
