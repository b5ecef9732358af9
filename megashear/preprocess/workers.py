"""Worker processes of a preprocessing run, and its progress line.

Workers end with their parent. If a shard fails, the others stop at their next line. The progress line shows shards,
rates and the remaining time.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megashear.dataset.tokenizer import Tokenizer, load_tokenizer
from megashear.errors import DataError
from megashear.preprocess.shard_files import ShardPiece
from megashear.preprocess.tokenized_parts import PartSettings, write_part
from megashear.processes import end_with_parent


class Progress:
    """Reports how far `total` units have come."""

    def __init__(self, what: str, total: int, shards: int = 0, output: TextIO | None = None) -> None:
        """what: name of the step; total: units in all (bytes where there are shards to count, else tokens)."""
        self.what, self.total, self.shards = what, max(total, 1), shards
        self.output = sys.stderr if output is None else output
        self.terminal = self.output.isatty()
        self.start = self.last = time.monotonic()

    def update(self, done: int, tokens: int, shards: int = 0) -> None:
        """Report, unless the last report is recent. done: units; tokens: tokens, for the rate; shards: finished."""
        if time.monotonic() - self.last >= (1.0 if self.terminal else 10.0):
            self._write(done, tokens, shards)

    def finish(self, tokens: int) -> None:
        """Report the end."""
        self._write(self.total, tokens, self.shards)
        if self.terminal:
            self.output.write("\n")

    def _write(self, done: int, tokens: int, shards: int) -> None:
        self.last = time.monotonic()
        seconds = max(self.last - self.start, 1e-9)
        share = min(done / self.total, 1.0)
        left = seconds * (1 - share) / share if share > 0 else float("inf")
        eta = "?" if left == float("inf") else f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        parts = [f"{self.what}: {share:6.1%}"]
        if self.shards:
            parts += [f"{shards} of {self.shards} shards", f"{done / seconds / 1e6:,.1f} MB/s"]
        line = "  ".join([*parts, f"{tokens:,} tokens", f"{tokens / seconds:,.0f} tokens/s", f"left {eta}"])
        self.output.write(f"\r{line}\x1b[K" if self.terminal else line + "\n")
        self.output.flush()


AHEAD = 4  # tasks a worker that wait in the queue


class Worker:
    """What a worker process holds: tokenizer (loaded when needed), settings, counters of all workers, the stop sign."""

    current: "Worker"

    def __init__(self, tokenizer: Path, settings: PartSettings, counters: Any, stop: Any) -> None:
        self.path, self.settings, self.counters, self.stop = tokenizer, settings, counters, stop
        self.tokenizer: Tokenizer | None = None
        self.reported = (0, 0)
        self.last = 0.0

    def on_progress(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Add what is new since the last report to the shared counters, ten times a second."""
        if (now := time.monotonic()) - self.last >= 0.1:
            self.last = now
            self.report(bytes_read, tokens)
            if self.stop.is_set():
                raise DataError("stopped because another shard failed")

    def report(self, bytes_read: int, tokens: int) -> None:
        """Add to the shared counters."""
        with self.counters.get_lock():
            self.counters[0] += bytes_read - self.reported[0]
            self.counters[1] += tokens - self.reported[1]
        self.reported = (bytes_read, tokens)


def start_worker(tokenizer: Path, settings: PartSettings, counters: Any, stop: Any) -> None:
    """Prepare a worker process: it ends with its parent, and leaves interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    Worker.current = Worker(tokenizer, settings, counters, stop)


def make_part(piece: ShardPiece, folder: Path) -> str:
    """Tokenise a piece of a shard in a worker process; returns what encoded it, see `Tokenizer.served_by`."""
    worker = Worker.current
    worker.tokenizer = worker.tokenizer or load_tokenizer(worker.path)
    worker.reported = (0, 0)
    tokens = write_part(folder, piece, worker.tokenizer, worker.settings, worker.on_progress)
    worker.report(piece_size(piece), tokens)
    return worker.tokenizer.served_by


def piece_size(piece: ShardPiece) -> int:
    """Bytes of a piece."""
    start, stop = piece.share(piece.path.stat().st_size)
    return stop - start


class Workers:
    """A pool of worker processes."""

    def __init__(self, pool: ProcessPoolExecutor, count: int, counters: Any) -> None:
        self.pool, self.count, self.counters = pool, count, counters

    def tokenise(self, missing: list[tuple[ShardPiece, Path]]) -> set[str]:
        """Make parts, (piece, folder) each; returns what encoded them. Raises the first error as soon as it comes."""
        encoders: set[str] = set()
        if not missing:
            return encoders
        # Long pieces first, so that no worker is left with one at the end.
        sizes = {piece: piece_size(piece) for piece, _ in missing}
        shards = len({piece.path for piece in sizes})
        progress = Progress("tokenise", sum(sizes.values()), shards)
        jobs = sorted(missing, key=lambda pair: -sizes[pair[0]])
        waiting = {self.pool.submit(make_part, piece, folder): piece.path for piece, folder in jobs}
        while waiting:
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                encoders.add(future.result())
                del waiting[future]
            progress.update(self.counters[0], self.counters[1], shards - len(set(waiting.values())))
        progress.finish(self.counters[1])
        return encoders

    def each(self, task: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        """`map` over the processes, in order; inputs are taken as they are needed."""
        running: list[Future[Any]] = []
        for given in inputs:
            running.append(self.pool.submit(task, given))
            if len(running) >= AHEAD * self.count:
                yield running.pop(0).result()
        while running:
            yield running.pop(0).result()


@contextmanager
def start_workers(count: int, tokenizer: Path, settings: PartSettings) -> Iterator[Workers]:
    """`count` processes; on leaving, what they have not begun is dropped. Raises DataError where one of them dies."""
    spawn = multiprocessing.get_context("spawn")
    counters, stop = spawn.Array("q", 2), spawn.Event()
    pool = ProcessPoolExecutor(count, spawn, start_worker, (tokenizer, settings, counters, stop))
    try:
        yield Workers(pool, count, counters)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory, or killed); run again with fewer --workers, finished shards are kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
