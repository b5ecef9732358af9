"""Read the tokens of planned batches ahead of the step, and held-out windows.

A rank reads its own rows of the global batch from memory-mapped files, in the files' dtype. Reading ahead is planned by
a copy of the stream and used only if the stream then plans the same, so neither order nor state depend on it; a change
of weights costs one batch that is read again.
Shape suffixes: N rows read, T tokens of a row (S + 1).
"""

import copy
import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megashear.dataset.dataset_folder import Dataset
from megashear.dataset.samples import read_sample
from megashear.errors import DataError, TrainingError
from megashear.mixture.blend import BatchPlan, BlendedStream


class Loader:
    """Reads rows of planned batches from a dataset.

    Attributes:
        stream: The blended stream.
        sequence_length: Tokens predicted per sequence.
        separator: Token at which attention restarts; None: never.
    """

    def __init__(
        self, dataset: Dataset, stream: BlendedStream, sequence_length: int, separate_documents: bool = False
    ) -> None:
        """stream: the plan's domains must be the dataset's, by name; its order of domains numbers the rows' domains."""
        assert set(stream.names) <= set(dataset.domains)
        self.stream, self.sequence_length = stream, sequence_length
        self.separator = dataset.eos_id if separate_documents else None
        self._tokens = [dataset.stream(name, "train") for name in stream.names]

    def read(self, plan: BatchPlan, rows: slice | Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N, S+1] in the files' dtype (uint16 or int32) and domain indices int64 [N] of these rows of the
        global batch, on the CPU.
        """
        index = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        domain_N, sample_N = plan.domain_B[index], plan.sample_B[index]
        token_NT = np.empty((len(domain_N), self.sequence_length + 1), dtype=self._tokens[0].dtype)
        for row, (domain, sample) in enumerate(zip(domain_N, sample_N, strict=True)):
            token_NT[row] = read_sample(self._tokens[domain], int(sample), self.sequence_length)
        return torch.from_numpy(token_NT), torch.from_numpy(np.array(domain_N, dtype=np.int64))


class HeldOut:
    """Windows of S+1 tokens at equal distances in each domain's held-out split, the same ones each time.

    They do not overlap. Neighbours are often parts of one document, so windows that are far apart represent a domain
    better.

    Attributes:
        names: Names of the domains.
        rows: (domain index, window) of each window, in the order of domains.
        sequence_length: Tokens predicted per window.
        separator: Token at which attention restarts; None: never.
    """

    def __init__(
        self, dataset: Dataset, sequence_length: int, sequences_per_domain: int, separate_documents: bool = False
    ) -> None:
        """sequences_per_domain: windows wanted; a domain with fewer gives what it has, DataError where that is none."""
        self.names, self.sequence_length = dataset.domains, sequence_length
        self.separator = dataset.eos_id if separate_documents else None
        self._tokens = [dataset.stream(name, "heldout") for name in self.names]
        self.rows: list[tuple[int, int]] = []
        for index, (name, stream) in enumerate(zip(self.names, self._tokens, strict=True)):
            windows = len(stream) // (sequence_length + 1)
            if windows < 1:
                raise DataError(
                    f"{dataset.folder}: domain {name!r} has {len(stream)} held-out tokens, fewer than one window of "
                    f"{sequence_length + 1}; preprocess with a larger --heldout-fraction or --heldout-limit, or lower "
                    "data.sequence_length"
                )
            taken = min(windows, sequences_per_domain)
            self.rows += [(index, number * windows // taken) for number in range(taken)]

    def first(self, sequences: int) -> "HeldOut":
        """The first windows of each domain only, at most `count`."""
        few = copy.copy(self)
        taken = dict.fromkeys(range(len(self.names)), 0)
        few.rows = []
        for domain, window in self.rows:
            if taken[domain] < sequences:
                few.rows.append((domain, window))
                taken[domain] += 1
        return few

    def digests(self) -> dict[str, str]:
        """64-bit digest of each domain's windows and of the separator."""
        found = {}
        for index, name in enumerate(self.names):
            tokens, _ = self.read([row for row, (domain, _) in enumerate(self.rows) if domain == index])
            content = tokens.numpy().astype("<u4").tobytes() + repr((tuple(tokens.shape), self.separator)).encode()
            found[name] = hashlib.blake2b(content, digest_size=8).hexdigest()
        return found

    def read(self, rows: Sequence[int] | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N, S+1] in the files' dtype and domain indices int64 [N] of these entries of `rows`, on the CPU."""
        chosen = self.rows[rows] if isinstance(rows, slice) else [self.rows[i] for i in rows]
        width = self.sequence_length + 1
        token_NT = np.empty((len(chosen), width), dtype=self._tokens[0].dtype)
        for row, (domain, window) in enumerate(chosen):
            token_NT[row] = self._tokens[domain][window * width : (window + 1) * width]
        return torch.from_numpy(token_NT), torch.tensor([domain for domain, _ in chosen], dtype=torch.int64)


class Batches:
    """Yields a rank's rows of one global batch after another. Close it when done."""

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
        """Advance the stream, and return the next plan with this rank's tokens [rows, S + 1].

        Raises the errors of `BlendedStream.next_batch` and of reading the dataset.
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
