"""Parts to a dataset: documents split into training and held-out, shuffled, and written domain by domain.

Key properties: the order is a keyed permutation of the document's number (shards in order, lines in order), so the
bytes are the same whatever the number of workers; where a document comes to lie is known before any token moves, so
that a pair's `.bin` is written in pieces by many processes at once; only document tables are held in memory (about 60
bytes a document), tokens are copied from memory-mapped parts. Read next: `manifest.py`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megashear.data.duplicates import find_duplicates
from megashear.data.heldout import HeldOutRule, heldout_hashes
from megashear.data.indexed import pair, token_dtype, write_index
from megashear.data.manifest import SPLITS, prefix, write_dataset_manifest
from megashear.data.parts import Part
from megashear.data.report import DomainReport, describe, report_text
from megashear.data.samples import Permutation
from megashear.data.tokenizer import Tokenizer
from megashear.errors import DataError

Counts = dict[str, dict[str, dict[str, int]]]
PIECE = 1 << 24  # tokens written at a time, about


@dataclass(frozen=True)
class Merging:
    """How parts become a dataset: what is held out, the seed of the order, whether duplicates are left out.

    draw: called with the reports and the new folder, to add a picture.
    """

    heldout: HeldOutRule
    seed: int = 0
    drop_duplicates: bool = False
    draw: Callable[[Sequence[DomainReport], Path], None] | None = None


class DomainTable:
    """The documents of one domain in order: part number, first token in the part, hash and length, each [documents]."""

    def __init__(self, name: str, parts: list[Part], duplicates: list[np.ndarray], drop: bool) -> None:
        """duplicates: of every part, bool [documents]; drop: leave them out."""
        self.name = name
        chosen, starts, self.duplicates = [], [], 0
        for part, duplicate_N in zip(parts, duplicates, strict=True):
            mine_N = part.table["domain"] == (part.domains.index(name) if name in part.domains else -1)
            self.duplicates += int((mine_N & duplicate_N).sum())
            chosen.append(np.flatnonzero(mine_N & ~duplicate_N if drop else mine_N))
            ends_N = np.cumsum(part.table["length"], dtype=np.int64)
            starts.append((ends_N - part.table["length"])[chosen[-1]])
        picked = [part.table[rows] for part, rows in zip(parts, chosen, strict=True)]
        self.part_N = np.repeat(np.arange(len(parts), dtype=np.int32), [len(rows) for rows in chosen])
        self.start_N = np.concatenate(starts)
        self.hash_N = np.concatenate([rows["hash"] for rows in picked])
        self.length_N = np.concatenate([rows["length"] for rows in picked])
        self.report = describe(name, self.length_N, np.concatenate([rows["bytes"] for rows in picked]), self.duplicates)


@dataclass(frozen=True)
class Piece:
    """A run of documents of one `.bin` file: where it begins, in tokens, and where its documents lie, each [documents].

    sources: token files of parts and their dtypes, which part_N numbers.
    """

    target: Path
    at: int
    dtype: np.dtype
    sources: list[tuple[Path, np.dtype]]
    part_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray


def merge_parts(
    folder: Path,
    parts: list[Part],
    tokenizer: Tokenizer,
    merging: Merging,
    extra: dict[str, Any],
    on_progress: Callable[[int], None] = lambda tokens: None,
    each: Callable[..., Iterable[Any]] = map,
) -> tuple[Counts, list[DomainReport]]:
    """Write the whole dataset into the empty `folder`.

    parts: in the order of their shards; extra: further keys of the manifest; on_progress: called with the tokens of
    every piece written; each: `map`, or one over several processes. Returns tokens and documents by domain and split,
    and the domains' reports. Raises DataError where a domain is left without training documents; OSErrors of the disk
    pass through.
    """
    names = sorted({name for part in parts for name in part.domains})
    if not names:
        raise DataError("no document in all shards; check the inputs, --text-key and bad_lines.jsonl")
    duplicates = find_duplicates([part.table for part in parts])
    tables = [DomainTable(name, parts, duplicates, merging.drop_duplicates) for name in names]
    counts: Counts = {}
    pieces: list[Iterator[Piece]] = []
    for table, held_N in zip(tables, held_out(tables, merging.heldout), strict=True):
        for split, rows in zip(SPLITS, (np.flatnonzero(~held_N), np.flatnonzero(held_N)), strict=True):
            order = Permutation(len(rows), merging.seed, table.name, split)(np.arange(len(rows))) if len(rows) else rows
            pieces.append(lay_out(prefix(folder, table.name, split), table, rows[order], parts, tokenizer))
            counted = {"tokens": int(table.length_N[rows].sum(dtype=np.int64)), "documents": len(rows)}
            counts.setdefault(table.name, {})[split] = counted
    for written in each(write_piece, (piece for several in pieces for piece in several)):
        on_progress(written)
    (folder / "tokenizer").mkdir()
    for file in tokenizer.files:
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    write_bad_lines(folder / "bad_lines.jsonl", parts)
    reports = [table.report for table in tables]
    (folder / "report.txt").write_text(report_text(reports, merging.drop_duplicates), encoding="utf-8")
    if merging.draw is not None:
        merging.draw(reports, folder)
    found = {"found": {table.name: table.duplicates for table in tables}, "dropped": merging.drop_duplicates}
    write_dataset_manifest(folder, counts, tokenizer, {**extra, "duplicates": found}, each)
    return counts, reports


def held_out(tables: list[DomainTable], rule: HeldOutRule) -> list[np.ndarray]:
    """Which documents are held out, bool [documents] of every table; a text that one domain holds out, all do."""
    for table in tables:
        if not len(table.hash_N):
            raise DataError(
                f"domain {table.name!r}: every one of its {table.duplicates} documents stood earlier in the input; "
                "leave the domain out, or run without --drop-duplicates"
            )
    held_U = np.unique(np.concatenate([heldout_hashes(table.hash_N, table.length_N, rule) for table in tables]))
    held = [np.isin(table.hash_N, held_U) for table in tables]
    for table, held_N in zip(tables, held, strict=True):
        if held_N.all():
            raise DataError(
                f"domain {table.name!r}: every one of its {len(held_N)} documents would be held out; "
                "add text, give it to another domain (--domain-map) or lower --heldout-fraction"
            )
    return held


def lay_out(
    target: Path, table: DomainTable, rows: np.ndarray, parts: list[Part], tokenizer: Tokenizer
) -> Iterator[Piece]:
    """Write the index of a pair and an empty `.bin` of its size; yield the pieces that fill it.

    target: path without `.bin`/`.idx`; rows: the table's documents that it holds, in order.
    """
    dtype, (bin_path, idx_path) = token_dtype(tokenizer.vocab_size), pair(target)
    length_N = table.length_N[rows]
    write_index(idx_path, dtype, length_N)
    end_N = np.cumsum(length_N, dtype=np.int64)
    with open(bin_path, "wb") as file:
        file.truncate(int(end_N[-1]) * dtype.itemsize if len(end_N) else 0)
    first = 0
    while first < len(rows):
        at = int(end_N[first] - length_N[first])
        last = max(first + 1, int(np.searchsorted(end_N, at + PIECE, side="right")))
        here = rows[first:last]
        used, part_N = np.unique(table.part_N[here], return_inverse=True)
        sources = [(parts[number].tokens_path, parts[number].dtype) for number in used]
        yield Piece(bin_path, at, dtype, sources, part_N, table.start_N[here], length_N[first:last])
        first = last


@lru_cache(maxsize=64)
def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A part's tokens, memory-mapped; few are kept, since each holds a file open."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def write_piece(piece: Piece) -> int:
    """Copy the documents of a piece to their place; returns its tokens. OSErrors of the disk pass through."""
    at_N = np.cumsum(piece.length_N, dtype=np.int64) - piece.length_N
    token_T = np.empty(int(piece.length_N.sum(dtype=np.int64)), piece.dtype)
    order = np.argsort(piece.part_N, kind="stable")
    bounds = np.searchsorted(piece.part_N[order], np.arange(len(piece.sources) + 1))
    for (path, dtype), low, high in zip(piece.sources, bounds[:-1], bounds[1:], strict=True):
        source, rows = mapped(path, dtype), order[low:high]
        places = zip(at_N[rows].tolist(), piece.start_N[rows].tolist(), piece.length_N[rows].tolist(), strict=True)
        for at, start, length in places:
            token_T[at : at + length] = source[start : start + length]
    with open(piece.target, "rb+") as file:
        file.seek(piece.at * piece.dtype.itemsize)
        file.write(token_T.astype(piece.dtype.newbyteorder("<"), copy=False).data)
    return len(token_T)


def write_bad_lines(path: Path, parts: list[Part]) -> None:
    """All bad lines in the order of the shards, one JSON object a line, numbered in the whole shard."""
    before = 0  # lines of the same shard in earlier pieces
    with open(path, "wb") as whole:
        for part in parts:
            before = before if part.piece else 0
            if part.bad_lines is not None:
                with open(part.bad_lines, "rb") as file:
                    for line in file:
                        entry = json.loads(line)
                        entry["line"] += before
                        whole.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            before += part.lines
