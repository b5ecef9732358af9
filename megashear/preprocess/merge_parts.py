"""Merge parts into a dataset: documents split, shuffled and written by domain.

The position of each document is computed before tokens are moved, so many processes write a pair at once, and the bytes
are the same for any number of workers. Tokens are copied from memory-mapped parts.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from megashear.dataset.dataset_folder import SPLITS, prefix, write_dataset_manifest
from megashear.dataset.indexed import pair, token_dtype, write_index
from megashear.dataset.tokenizer import Tokenizer
from megashear.preprocess.dataset_report import DomainReport, report_text
from megashear.preprocess.document_order import Documents, Layout
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.tokenized_parts import Part

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
    with TemporaryDirectory(prefix=".order", dir=folder) as order:
        found = Documents(parts, merging.drop_duplicates, Path(order))
        targets = [(name, split) for name in found.names for split in SPLITS]
        held_U = found.held_out(merging.heldout)
        layout = Layout(found, held_U, [(merging.seed, *target) for target in targets], Path(order))
        pieces = (
            piece
            for number, target in enumerate(targets)
            for piece in lay_out(prefix(folder, *target), layout, number, parts, tokenizer)
        )
        for written in each(write_piece, pieces):
            on_progress(written)
    counts = {
        name: {split: {"tokens": t, "documents": d} for split, t, d in zip(SPLITS, *both, strict=True)}
        for name, *both in zip(found.names, layout.tokens.tolist(), layout.documents.tolist(), strict=True)
    }
    (folder / "tokenizer").mkdir()
    for file in tokenizer.files:
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    write_bad_lines(folder / "bad_lines.jsonl", parts)
    (folder / "report.txt").write_text(report_text(found.reports, merging.drop_duplicates), encoding="utf-8")
    if merging.draw is not None:
        merging.draw(found.reports, folder)
    duplicates = {report.name: report.duplicates for report in found.reports}
    copies = {"found": duplicates, "dropped": merging.drop_duplicates}
    write_dataset_manifest(folder, counts, tokenizer, {**extra, "duplicates": copies}, each)
    return counts, found.reports


def lay_out(target: Path, layout: Layout, number: int, parts: list[Part], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Write the index of a pair and an empty `.bin` of its size; yield the pieces that fill it.

    target: path without `.bin`/`.idx`; number: of the pair in the layout.
    """
    dtype, (bin_path, idx_path) = token_dtype(tokenizer.vocab_size), pair(target)
    write_index(idx_path, dtype, (place_N["length"] for place_N in layout.places(number)))
    with open(bin_path, "wb") as file:
        file.truncate(int(layout.tokens.flat[number]) * dtype.itemsize)
    at = 0
    for place_N in layout.places(number):
        end_N = at + np.cumsum(place_N["length"], dtype=np.int64)
        first = 0
        while first < len(place_N):
            last = max(first + 1, int(np.searchsorted(end_N, at + PIECE, side="right")))
            here = place_N[first:last]
            used, part_N = np.unique(here["part"], return_inverse=True)
            sources = [(parts[part].tokens_path, parts[part].dtype) for part in used]
            yield Piece(bin_path, at, dtype, sources, part_N, here["start"].astype(np.int64), here["length"].copy())
            first, at = last, int(end_N[last - 1])


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
