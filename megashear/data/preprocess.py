"""From shards to a dataset folder: every shard to a part by worker processes, then the parts merged in the order of the
shards.

Key properties: the bytes do not depend on the number of workers nor on how often the run was killed; finished parts are
kept in `<output>.parts/` until the dataset is whole, and only missing ones are made again. Read next: `parts.py`,
`merge.py`.
"""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megashear.data.heldout import HeldOutRule
from megashear.data.indexed import token_dtype
from megashear.data.inputs import find_shards
from megashear.data.merge import Counts, merge_parts, write_bad_lines
from megashear.data.parts import Part, PartSettings, part_name, write_part
from megashear.data.progress import Progress
from megashear.data.tokenizer import Tokenizer, load_tokenizer
from megashear.errors import DataError
from megashear.files.atomic import atomic_file, atomic_folder
from megashear.files.lock import run_lock


@dataclass(frozen=True)
class Preprocessing:
    """A preprocessing run: what is read, how, and where the dataset goes."""

    inputs: list[str]
    tokenizer: Path
    output: Path
    part: PartSettings = field(default_factory=PartSettings)
    heldout: HeldOutRule = field(default_factory=HeldOutRule)
    max_bad_fraction: float = 0.001
    seed: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Summary:
    """What a run did: counts by domain and split, lines read, bad lines, shards taken over from a run before."""

    counts: Counts
    lines: int
    bad: int
    shards: int
    kept: int


def preprocess(job: Preprocessing) -> Summary:
    """Make the dataset folder of a job.

    Raises DataError (inputs, tokenizer, too many bad lines), StorageError (disk) or BusyError (the same output twice).
    """
    refuse_output(job.output)
    tokenizer = load_tokenizer(job.tokenizer)
    shards = find_shards(job.inputs)
    work = job.output.with_name(job.output.name + ".parts")
    folders = [work / part_name(shard, tokenizer, job.part) for shard in shards]
    with run_lock(work):
        refuse_output(job.output)
        missing = [(shard, folder) for shard, folder in zip(shards, folders, strict=True) if not folder.is_dir()]
        tokenise(missing, job)
        parts = [Part(folder, token_dtype(tokenizer.vocab_size)) for folder in folders]
        lines, bad = count_lines(parts, job.max_bad_fraction, work / "bad_lines.jsonl")
        described = {"lines": lines, "bad": bad, "shards": len(shards), "seed": job.seed, "heldout": vars(job.heldout)}
        counts = write_dataset(job, parts, tokenizer, {"preprocessing": described})
        shutil.rmtree(work, ignore_errors=True)
    return Summary(counts, lines, bad, len(shards), len(shards) - len(missing))


def refuse_output(output: Path) -> None:
    """Raise DataError where something stands in the output's place."""
    if output.exists():
        raise DataError(f"{output}: already there; remove it or give another --output")


def count_lines(parts: list[Part], max_bad_fraction: float, report: Path) -> tuple[int, int]:
    """Lines and bad lines of all parts; with too many bad ones, writes them to `report` and raises DataError."""
    lines, bad = sum(part.lines for part in parts), sum(part.bad for part in parts)
    if bad > max_bad_fraction * lines:
        with atomic_file(report) as temporary:
            write_bad_lines(temporary, parts)
        raise DataError(
            f"{bad} of {lines} lines are bad, more than --max-bad-fraction {max_bad_fraction:g}; see {report}, repair "
            "the shards or allow more (finished shards are kept)"
        )
    return lines, bad


def write_dataset(job: Preprocessing, parts: list[Part], tokenizer: Tokenizer, extra: dict[str, Any]) -> Counts:
    """Merge the parts into the output folder, whole or not at all."""
    total = sum(len(part.tokens) for part in parts)
    progress, done = Progress("merge", total), 0

    def on_document(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress.update(done, done)

    with atomic_folder(job.output) as folder:
        counts = merge_parts(folder, parts, tokenizer, job.heldout, job.seed, extra, on_document)
    progress.finish(total)
    return counts


# ---- worker processes ----


class Worker:
    """What a worker process holds: tokenizer, settings, counters shared by all workers, the sign to stop."""

    current: "Worker"

    def __init__(self, tokenizer: Path, settings: PartSettings, counters: Any, stop: Any) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self.settings, self.counters, self.stop = settings, counters, stop
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


def end_with(parent: Any) -> None:
    """End this process when its parent has ended, however that came: a killed run leaves no worker behind."""
    parent.join()
    os._exit(1)


def start_worker(tokenizer: Path, settings: PartSettings, counters: Any, stop: Any) -> None:
    """Prepare a worker process: it ends with its parent, and leaves interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    Worker.current = Worker(tokenizer, settings, counters, stop)


def make_part(shard: Path, folder: Path) -> None:
    """Tokenise one shard in a worker process."""
    worker = Worker.current
    worker.reported = (0, 0)
    tokens = write_part(folder, shard, worker.tokenizer, worker.settings, worker.on_progress)
    worker.report(shard.stat().st_size, tokens)


def tokenise(missing: list[tuple[Path, Path]], job: Preprocessing) -> None:
    """Make the missing parts, (shard, folder) each, by `job.workers` processes; raises the first error."""
    if not missing:
        return
    spawn = multiprocessing.get_context("spawn")
    counters, stop = spawn.Array("q", 2), spawn.Event()
    progress = Progress("tokenise", sum(shard.stat().st_size for shard, _ in missing))
    # Long shards first, so that no worker is left with one at the end.
    jobs = sorted(missing, key=lambda pair: -pair[0].stat().st_size)
    with ProcessPoolExecutor(
        min(job.workers, len(jobs)), spawn, start_worker, (job.tokenizer, job.part, counters, stop)
    ) as pool:
        futures = [pool.submit(make_part, shard, folder) for shard, folder in jobs]
        try:
            wait_for(futures, counters, progress)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (out of memory, or killed); run again with fewer --workers, finished "
                "shards are kept"
            ) from error
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    progress.finish(counters[1])


def wait_for(futures: list[Future[None]], counters: Any, progress: Progress) -> None:
    """Wait until all are done, reporting; raises the first error as soon as it comes."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        progress.update(counters[0], counters[1])


def table(summary: Summary, heldout: HeldOutRule) -> str:
    """The counts of a run as text, with a line for every domain that holds out fewer sequences than wanted."""
    rows: list[tuple[str, ...]] = [("domain", "train tokens", "documents", "held-out tokens", "documents")]
    short = []
    for name, splits in summary.counts.items():
        train, held = splits["train"], splits["heldout"]
        numbers = (train["tokens"], train["documents"], held["tokens"], held["documents"])
        rows.append((name, *(f"{number:,}" for number in numbers)))
        sequences = held["tokens"] // (heldout.sequence_length + 1)
        if sequences < heldout.sequences:
            short.append(
                f"domain {name!r} holds out {sequences} sequences of {heldout.sequence_length}, fewer than "
                f"{heldout.sequences}: raise --heldout-limit, add text or shorten --sequence-length"
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.append(
        f"{summary.shards} shards ({summary.kept} from before), {summary.lines:,} lines, "
        f"{summary.bad:,} bad (bad_lines.jsonl)"
    )
    return "\n".join(lines + short)
