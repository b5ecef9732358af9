"""Parts to a dataset: documents split into training and held-out, shuffled, and written domain by domain.

Key properties: the order is a keyed permutation of the document's number (shards in order, lines in order), so the
bytes are the same whatever the number of workers; only document tables are held in memory (16 bytes a document), tokens
are copied from memory-mapped parts. Read next: `manifest.py`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megashear.data.heldout import HeldOutRule, heldout_hashes
from megashear.data.indexed import IndexedWriter, token_dtype
from megashear.data.manifest import SPLITS, prefix, write_dataset_manifest
from megashear.data.parts import Part
from megashear.data.samples import Permutation
from megashear.data.tokenizer import Tokenizer
from megashear.errors import DataError

Counts = dict[str, dict[str, dict[str, int]]]


class DomainTable:
    """All documents of one domain in order: part number, place in the part, hash and length, each [documents]."""

    def __init__(self, name: str, parts: list[Part]) -> None:
        self.name = name
        chosen = [
            np.flatnonzero(part.table["domain"] == part.domains.index(name))
            if name in part.domains
            else np.empty(0, int)
            for part in parts
        ]
        self.part_N = np.repeat(np.arange(len(parts)), [len(rows) for rows in chosen])
        self.row_N = np.concatenate(chosen)
        self.hash_N = np.concatenate([part.table["hash"][rows] for part, rows in zip(parts, chosen, strict=True)])
        self.length_N = np.concatenate([part.table["length"][rows] for part, rows in zip(parts, chosen, strict=True)])


def merge_parts(
    folder: Path,
    parts: list[Part],
    tokenizer: Tokenizer,
    rule: HeldOutRule,
    seed: int,
    extra: dict[str, Any],
    on_progress: Callable[[int], None],
) -> Counts:
    """Write the whole dataset into the empty `folder`.

    parts: in the order of their shards; seed: of the documents' order; extra: further keys of the manifest;
    on_progress: called with the tokens of every document written. Returns tokens and documents by domain and split.
    Raises DataError where a domain is left without training documents; OSErrors of the disk pass through.
    """
    tables = [DomainTable(name, parts) for name in sorted({name for part in parts for name in part.domains})]
    if not tables:
        raise DataError("no document in all shards; check the inputs, --text-key and bad_lines.jsonl")
    held = [heldout_hashes(table.hash_N, table.length_N, rule) for table in tables]
    held_U = np.unique(np.concatenate(held))
    counts: Counts = {}
    for table in tables:
        held_N = np.isin(table.hash_N, held_U)
        if held_N.all():
            raise DataError(
                f"domain {table.name!r}: every one of its {len(held_N)} documents would be held out; "
                "add text, give it to another domain (--domain-map) or lower --heldout-fraction"
            )
        for split, rows in zip(SPLITS, (np.flatnonzero(~held_N), np.flatnonzero(held_N)), strict=True):
            written = write_split(folder, table, split, rows, parts, tokenizer, seed, on_progress)
            counts.setdefault(table.name, {})[split] = written
    (folder / "tokenizer").mkdir()
    for file in tokenizer.files:
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    write_bad_lines(folder / "bad_lines.jsonl", parts)
    write_dataset_manifest(folder, counts, tokenizer, extra)
    return counts


def write_split(
    folder: Path,
    table: DomainTable,
    split: str,
    rows: np.ndarray,
    parts: list[Part],
    tokenizer: Tokenizer,
    seed: int,
    on_progress: Callable[[int], None],
) -> dict[str, int]:
    """Write one pair, its documents (`rows` of the table) in the keyed order; returns its tokens and documents."""
    order = Permutation(len(rows), seed, table.name, split)(np.arange(len(rows))) if len(rows) else rows
    with IndexedWriter(prefix(folder, table.name, split), token_dtype(tokenizer.vocab_size)) as writer:
        for row in rows[order]:
            part, place = parts[table.part_N[row]], table.row_N[row]
            start, length = part.starts[place], table.length_N[row]
            writer.add_document(part.tokens[start : start + length])
            on_progress(int(length))
    return {"tokens": writer.tokens, "documents": len(writer.lengths)}


def write_bad_lines(path: Path, parts: list[Part]) -> None:
    """All bad lines in the order of the shards, one JSON object a line."""
    with open(path, "wb") as whole:
        for part in parts:
            with open(part.folder / "bad_lines.jsonl", "rb") as file:
                shutil.copyfileobj(file, whole)
