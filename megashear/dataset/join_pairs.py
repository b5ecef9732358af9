"""Join and split pairs document by document, without an index in memory.

Works in chunks of some MiB. Sequences of a document stay together, as in megatron-core's builder. The `.idx` gets its
name last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megashear.dataset.indexed import CHUNK, DTYPE_CODES, HEADER, MAGIC, IndexedTokens, pair
from megashear.errors import DataError
from megashear.files.atomic import atomic_file

TOKENS = 1 << 22  # copied at a time


@dataclass(frozen=True)
class Run:
    """Documents `low` to `high` - 1 of an opened pair, and their sequences `first` to `last` - 1."""

    source: IndexedTokens
    low: int
    high: int
    first: int
    last: int

    def chunks(self) -> Iterator[slice]:
        """Its sequences, some at a time."""
        for start in range(self.first, self.last, CHUNK):
            yield slice(start, min(start + CHUNK, self.last))

    def tokens(self) -> tuple[int, int]:
        """First token, and the end."""
        if self.first == self.last:
            return 0, 0
        size = self.source.dtype.itemsize
        return int(self.source.offsets[self.first]) // size, int(self.source.offsets[self.last - 1]) // size + int(
            self.source.lengths[self.last - 1]
        )


def run_of(source: IndexedTokens, low: int, high: int) -> Run:
    """A run of documents of a pair; raises DataError where the index is impossible."""
    first, last = int(source.bounds[low]), int(source.bounds[high])
    if not 0 <= first <= last <= source.sequences:
        raise DataError(f"{source.idx_path}: documents out of order; the file is damaged, make it again")
    return Run(source, low, high, first, last)


def merge_pairs(target: Path, prefixes: Sequence[Path]) -> IndexedTokens:
    """Write all documents of several pairs, in order, as one pair; returns it opened.

    target, prefixes: paths without `.bin`/`.idx`. Raises DataError (a pair, or pairs of several dtypes), StorageError.
    """
    opened = [IndexedTokens(prefix) for prefix in prefixes]
    return write_runs(target, [run_of(one, 0, one.documents) for one in opened if one.documents], opened[0].dtype)


def split_pair(prefix: Path, targets: Sequence[Path], ends: Sequence[int]) -> list[IndexedTokens]:
    """Write documents up to each of `ends` (ascending, the last is the pair's number) as pairs; returns them opened.

    Raises DataError, StorageError.
    """
    opened = IndexedTokens(prefix)
    edges = [0, *ends]
    if sorted(edges) != edges or edges[-1] != opened.documents or len(ends) != len(targets):
        raise DataError(f"{opened.idx_path}: cannot be cut at {list(ends)}; it has {opened.documents} documents")
    runs = [run_of(opened, low, high) for low, high in pairwise(edges)]
    return [write_runs(target, [run], opened.dtype) for target, run in zip(targets, runs, strict=True)]


def write_runs(target: Path, runs: Sequence[Run], dtype: np.dtype) -> IndexedTokens:
    """Write runs of documents back to back as the pair `target`; returns it opened."""
    other = next((run.source for run in runs if run.source.dtype != dtype), None)
    if other is not None:
        raise DataError(f"{other.bin_path}: {other.dtype} ids, the first pair has {dtype}; they do not go together")
    bin_path, idx_path = pair(target)
    sequences, documents = (sum(run.last - run.first for run in runs), sum(run.high - run.low for run in runs))
    with atomic_file(idx_path) as index, atomic_file(bin_path) as tokens:
        with open(index, "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[np.dtype(dtype.newbyteorder("="))], sequences, documents + 1))
            for column in columns(runs, dtype.itemsize):
                file.write(np.ascontiguousarray(column).data)
        with open(tokens, "wb") as file:
            for run in runs:
                start, stop = run.tokens()
                for at in range(start, stop, TOKENS):
                    file.write(run.source.tokens[at : min(at + TOKENS, stop)].data)
                    run.source.release()
    return IndexedTokens(target)


def columns(runs: Sequence[Run], size: int) -> Iterator[np.ndarray]:
    """The three columns of an index, piece by piece; raises DataError where sequences do not lie back to back."""
    for run in runs:
        for chunk in run.chunks():
            yield run.source.lengths[chunk]
            run.source.release()
    end = 0
    for run in runs:
        begin = run.tokens()[0] * size - end
        for chunk in run.chunks():
            byte_C = run.source.lengths[chunk].astype(np.int64) * size
            offset_C = end + np.cumsum(byte_C) - byte_C
            if (byte_C < 0).any() or (run.source.offsets[chunk] != offset_C + begin).any():
                raise DataError(f"{run.source.idx_path}: sequences do not lie back to back; make the pair again")
            yield offset_C.astype("<i8")
            run.source.release()
            end = int(offset_C[-1] + byte_C[-1])
    yield np.zeros(1, "<i8")
    before = 0
    for run in runs:
        for start in range(run.low + 1, run.high + 1, CHUNK):
            yield run.source.bounds[start : min(start + CHUNK, run.high + 1)] - run.first + before
            run.source.release()
        before += run.last - run.first
