"""Build a dataset folder from shards: worker processes tokenise shards to parts, then the parts are merged.

The bytes do not depend on the number of workers or on interruptions. Finished parts are kept in `<output>.parts/` until
the dataset is complete; a rerun makes only the missing ones.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megashear.dataset.indexed import token_dtype
from megashear.dataset.tokenizer import Tokenizer, load_tokenizer
from megashear.errors import DataError
from megashear.files.atomic import atomic_file, atomic_folder
from megashear.files.lock import run_lock
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Counts, Merging, merge_parts, write_bad_lines
from megashear.preprocess.shard_files import find_shards, pieces_of
from megashear.preprocess.tokenized_parts import Part, PartSettings, open_part, part_name
from megashear.preprocess.workers import Progress, Workers, start_workers


@dataclass(frozen=True)
class Preprocessing:
    """A preprocessing run: what is read, how, and where the dataset goes."""

    inputs: list[str]
    tokenizer: Path
    output: Path
    merging: Merging
    part: PartSettings = field(default_factory=PartSettings)
    max_bad_fraction: float = 0.001
    workers: int = 1


@dataclass(frozen=True)
class Summary:
    """What a run did: counts by domain and split, lines read, bad lines, duplicates, shards, how many from before, and
    what encoded the others (`Tokenizer.served_by`)."""

    counts: Counts
    lines: int
    bad: int
    duplicates: int
    dropped: bool
    shards: int
    kept: int
    encoders: set[str]


def preprocess(job: Preprocessing) -> Summary:
    """Make the dataset folder of a job.

    Raises DataError (inputs, tokenizer, too many bad lines), StorageError (disk) or BusyError (the same output twice).
    """
    refuse_output(job.output)
    tokenizer = load_tokenizer(job.tokenizer)
    shards = find_shards(job.inputs)
    work = job.output.with_name(job.output.name + ".parts")
    pieces = [piece for shard in shards for piece in pieces_of(shard)]
    folders = [work / part_name(piece, tokenizer, job.part) for piece in pieces]
    with run_lock(work):
        refuse_output(job.output)
        missing = [(piece, folder) for piece, folder in zip(pieces, folders, strict=True) if not folder.is_dir()]
        with start_workers(job.workers, job.tokenizer, job.part) as workers:
            encoders = workers.tokenise(missing)
            parts = [open_part(folder, token_dtype(tokenizer.vocab_size)) for folder in folders]
            lines, bad = count_lines(parts, job.max_bad_fraction, work / "bad_lines.jsonl")
            described: dict[str, Any] = {"lines": lines, "bad": bad, "shards": len(shards), "seed": job.merging.seed}
            described["heldout"] = vars(job.merging.heldout)
            counts, duplicates = write_dataset(job, parts, tokenizer, {"preprocessing": described}, workers)
        shutil.rmtree(work, ignore_errors=True)
    kept = len(shards) - len({piece.path for piece, _ in missing})
    return Summary(counts, lines, bad, duplicates, job.merging.drop_duplicates, len(shards), kept, encoders)


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


def write_dataset(
    job: Preprocessing, parts: list[Part], tokenizer: Tokenizer, extra: dict[str, Any], workers: Workers
) -> tuple[Counts, int]:
    """Merge the parts into the output folder, whole or not at all; returns what it holds, and duplicates found."""
    total = sum(part.tokens for part in parts)
    progress, done = Progress("merge", total), 0

    def on_piece(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress.update(done, done)

    with atomic_folder(job.output) as folder:
        counts, reports = merge_parts(folder, parts, tokenizer, job.merging, extra, on_piece, workers.each)
    progress.finish(total)
    return counts, sum(report.duplicates for report in reports)


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
        f"{summary.bad:,} bad (bad_lines.jsonl), {summary.duplicates:,} duplicates, "
        f"{'dropped' if summary.dropped else 'kept'}"
    )
    lines += [f"tokenised by the {encoder}" for encoder in sorted(summary.encoders)]
    return "\n".join(lines + short)
