"""Parts: tokenised shards, or pieces of them, as folders that are complete or absent.

A part holds `tokens.bin` (ids of all documents, each ended by the end-of-sequence token), `documents.bin` (per
document: digest of its text, size, domain, length), `bad_lines.jsonl` and `part.json`. Its name is a digest of all that
its bytes depend on: path, size and time of the shard, tokenizer and settings.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megashear.dataset.indexed import token_dtype
from megashear.dataset.tokenizer import Tokenizer
from megashear.errors import DataError
from megashear.files.atomic import atomic_folder, write_json
from megashear.preprocess.domains import DomainRule, NoDomain
from megashear.preprocess.shard_files import BadLine, Document, ShardPiece
from megashear.preprocess.shard_reader import ShardReader

CHUNK = 1 << 17  # documents of a table read at a time
FORMAT = 3  # of a part; parts of another are made again
# hash, check: blake2b of the text, 128 bits (`hash` decides on the held-out side, both on what is a duplicate);
# bytes: of the text; domain: index into the part's domains; length: tokens, end included.
DOCUMENT = np.dtype([("hash", "<u8"), ("check", "<u8"), ("bytes", "<u4"), ("domain", "<u4"), ("length", "<i4")])


@dataclass(frozen=True)
class PartSettings:
    """What a part's bytes depend on beside the shard and the tokenizer."""

    text_key: str = "text"
    rule: DomainRule = field(default_factory=DomainRule)


def part_name(piece: ShardPiece, tokenizer: Tokenizer, settings: PartSettings) -> str:
    """The name of the part folder of a shard's piece; raises DataError where there is no such shard."""
    shard = piece.path
    try:
        status = os.stat(shard)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror}); check the path") from error
    shard_identity = [str(shard), piece.number, piece.count, status.st_size, status.st_mtime_ns]
    identity = [FORMAT, *shard_identity, tokenizer.digest, tokenizer.eos_id, repr(settings)]
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def text_digest(text: bytes) -> bytes:
    """128 bits of blake2b of a text in UTF-8; the first half is `hash`, the second `check` of its document."""
    return hashlib.blake2b(text, digest_size=16).digest()


class PartWriter:
    """Collects the documents and bad lines of a piece of a shard in an open folder."""

    def __init__(self, folder: Path, piece: ShardPiece, tokenizer: Tokenizer, settings: PartSettings) -> None:
        self.folder, self.piece, self.shard = folder, piece, piece.path
        self.tokenizer, self.settings = tokenizer, settings
        self.stored = token_dtype(tokenizer.vocab_size).newbyteorder("<")
        self.end = np.array(tokenizer.eos_id, self.stored).tobytes()
        self.domains: dict[str, int] = {}
        self.digests, self.sizes = bytearray(), array("I")
        self.indices, self.lengths = array("I"), array("i")
        self.lines = self.bad = self.tokens = 0

    def write(self, on_progress: Callable[[int, int, int], None]) -> None:
        """Read the whole piece. on_progress is called per line with bytes read, documents and tokens so far."""
        reader = ShardReader(self.piece, self.settings.text_key, (self.settings.rule.key,))
        with open(self.folder / "tokens.bin", "wb") as tokens, open(self.folder / "bad_lines.jsonl", "wb") as bad:
            for entry in reader:
                self.lines = entry.line
                problem = entry if isinstance(entry, BadLine) else self._add(entry, tokens)
                if problem is not None:
                    self.bad += 1
                    bad.write(self._describe(problem))
                on_progress(reader.bytes_read, len(self.lengths), self.tokens)
        self._write_documents()

    def _add(self, document: Document, tokens: Any) -> BadLine | None:
        """Tokenise a document; a bad line where it has no usable domain."""
        try:
            domain = self.settings.rule.of(document.record, self.shard)
        except NoDomain as error:
            return BadLine(document.line, str(error), document.text[:200])
        ids = self.tokenizer.encode(document.text)
        tokens.write(ids.astype(self.stored).data)
        tokens.write(self.end)
        raw = document.text.encode("utf-8")
        self.digests += text_digest(raw)
        self.sizes.append(len(raw))
        self.indices.append(self.domains.setdefault(domain, len(self.domains)))
        self.lengths.append(len(ids) + 1)
        self.tokens += len(ids) + 1
        return None

    def _describe(self, problem: BadLine) -> bytes:
        entry = {"file": str(self.shard), "line": problem.line, "reason": problem.reason, "excerpt": problem.excerpt}
        return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "replace")

    def _write_documents(self) -> None:
        table = np.empty(len(self.lengths), DOCUMENT)
        table["hash"], table["check"] = np.frombuffer(self.digests, "<u8").reshape(-1, 2).T
        for column, values in (("bytes", self.sizes), ("domain", self.indices), ("length", self.lengths)):
            table[column] = values
        (self.folder / "documents.bin").write_bytes(table.tobytes())
        counts = {"lines": self.lines, "bad": self.bad, "documents": len(table), "tokens": self.tokens}
        described = {"shard": str(self.shard), "piece": self.piece.number, "domains": list(self.domains), **counts}
        write_json(self.folder / "part.json", described)


def write_part(
    folder: Path,
    piece: ShardPiece,
    tokenizer: Tokenizer,
    settings: PartSettings,
    on_progress: Callable[[int, int, int], None],
) -> int:
    """Tokenise a piece of a shard into the part `folder`, whole or not at all; returns its tokens.

    Raises DataError (shard) or StorageError (disk).
    """
    with atomic_folder(folder) as temporary:
        writer = PartWriter(temporary, piece, tokenizer, settings)
        writer.write(on_progress)
    return writer.tokens


class DocumentTable:
    """The documents of a part, in a file of DOCUMENT records that is read some records at a time."""

    def __init__(self, path: Path) -> None:
        """OSErrors pass through."""
        self.path, self._count = Path(path), os.stat(path).st_size // DOCUMENT.itemsize

    def __len__(self) -> int:
        return self._count

    def chunks(self) -> Iterator[np.ndarray]:
        """All documents in their order, DOCUMENT [up to CHUNK] each."""
        for start in range(0, self._count, CHUNK):
            yield np.fromfile(self.path, DOCUMENT, CHUNK, offset=start * DOCUMENT.itemsize)


@dataclass
class Part:
    """Documents and their tokens: `domains`; `table`, the documents; `tokens_path`, ids back to back in `dtype`.

    `tokens`: how many the documents have; `lines`, `bad`: read; `bad_lines`: the file that holds the bad ones, where
    there can be any; `piece`: number of the piece of its shard.
    """

    domains: list[str]
    table: DocumentTable
    tokens: int
    tokens_path: Path
    dtype: np.dtype
    lines: int = 0
    bad: int = 0
    bad_lines: Path | None = None
    piece: int = 0


def open_part(folder: Path, dtype: np.dtype) -> Part:
    """A finished part; raises DataError where it is damaged."""
    try:
        described = json.loads((folder / "part.json").read_text(encoding="utf-8"))
        table = DocumentTable(folder / "documents.bin")
        part = Part(
            domains=described["domains"],
            table=table,
            tokens=sum(int(chunk["length"].sum(dtype=np.int64)) for chunk in table.chunks()),
            tokens_path=folder / "tokens.bin",
            dtype=dtype,
            lines=int(described["lines"]),
            bad=int(described["bad"]),
            bad_lines=folder / "bad_lines.jsonl",
            piece=int(described["piece"]),
        )
        if part.tokens * dtype.itemsize != part.tokens_path.stat().st_size:
            raise ValueError("the lengths of the documents are not those of the tokens")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: a damaged part ({error}); remove it and run again") from error
    return part
