"""Read shards of JSON lines (plain, gzip, zstd) or parquet: each line is a document or a bad line with a reason.

Streams with bounded memory. A truncated compressed file is an error, never a shorter shard.
"""

import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from megashear.errors import DataError
from megashear.preprocess.shard_files import EXCERPT, LONGEST_LINE, PARQUET, SUFFIXES, BadLine, Document, ShardPiece

CHUNK = 1 << 18


class ShardReader:
    """Iterates over the lines of a shard or of a piece of it; lines are numbered from 1 in the piece.

    `bytes_read` is how much of the file has been taken so far.
    """

    def __init__(self, shard: Path | ShardPiece, text_key: str = "text", keys: Sequence[str] = ()) -> None:
        """shard: its name ends in one of SUFFIXES; text_key: the key of the objects that holds the text; keys: further
        columns to read of a parquet file. Raises DataError.
        """
        self.piece = shard if isinstance(shard, ShardPiece) else ShardPiece(Path(shard))
        self.path, self.text_key, self.keys = self.piece.path, text_key, keys
        self.bytes_read = 0
        if not self.path.name.endswith(SUFFIXES):
            raise DataError(f"{self.path}: not a shard that can be read; its name must end in {', '.join(SUFFIXES)}")

    def __iter__(self) -> Iterator[Document | BadLine]:
        """Yield every line; raises DataError where the file cannot be read, is truncated or is damaged."""
        if self.path.name.endswith(PARQUET):
            from megashear.preprocess.parquet import parquet_rows

            yield from parquet_rows(self.piece, self.text_key, self.keys, self._have_read)
            return
        for number, line in enumerate(split_lines(self._text_chunks()), start=1):
            if line is None:
                yield BadLine(number, f"longer than {LONGEST_LINE} bytes", "")
            else:
                if number == 1 and self.piece.number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield parse_line(number, line, self.text_key)

    def _have_read(self, size: int) -> None:
        self.bytes_read = size

    def _text_chunks(self) -> Iterator[bytes]:
        """Decompressed pieces of the file."""
        if self.path.name.endswith(".gz"):
            return gzip_chunks(self._file_chunks(), self.path)
        if self.path.name.endswith(".zst"):
            return zstd_chunks(self._file_chunks(), self.path)
        return self._file_chunks()

    def _file_chunks(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                start, stop = self.piece.share(os.fstat(file.fileno()).st_size)
                last = self.piece.number == self.piece.count - 1  # reads to the end, whatever the size says
                start, stop = line_start(file, start), sys.maxsize if last else line_start(file, stop)
                file.seek(start)
                while chunk := file.read(min(CHUNK, stop - start - self.bytes_read)):
                    self.bytes_read += len(chunk)
                    yield chunk
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from error


def line_start(file: BinaryIO, offset: int) -> int:
    """Where the first line begins that begins at `offset` or behind it."""
    if offset == 0:
        return 0
    place = offset - 1
    file.seek(place)
    while chunk := file.read(CHUNK):
        if (at := chunk.find(b"\n")) >= 0:
            return place + at + 1
        place += len(chunk)
    return place


def truncated(path: Path, what: str) -> DataError:
    """The message for a compressed file that ends before its end."""
    return DataError(f"{path}: truncated, the file ends inside of a {what}; fetch it again")


def gzip_chunks(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Decompress gzip, one member or several; raises DataError where it is truncated or damaged."""
    member: Any = None
    members = 0
    for chunk in chunks:
        data = chunk
        while data:
            if member is None:
                member, members = zlib.decompressobj(wbits=31), members + 1
            try:
                text = member.decompress(data)
            except zlib.error as error:
                raise DataError(f"{path}: damaged gzip data ({error}); fetch it again") from error
            if text:
                yield text
            data = member.unused_data
            if member.eof:
                member = None
                # Zero bytes after a member are padding that gzip itself accepts.
                data = data.lstrip(b"\0")
    if member is not None or members == 0:
        raise truncated(path, "gzip member")


def zstd_chunks(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Decompress zstd, one frame or several; raises DataError where it is truncated or damaged."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame: Any = None
    frames = 0
    for chunk in chunks:
        data = chunk
        while data:
            if frame is None:
                frame, frames = decompressor.decompressobj(), frames + 1
            try:
                text = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DataError(f"{path}: damaged zstd data ({error}); fetch it again") from error
            if text:
                yield text
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None or frames == 0:
        raise truncated(path, "zstd frame")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their newline; None for a line longer than LONGEST_LINE, which is not kept in memory."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield None if size > LONGEST_LINE else b"".join([*pending, end])
            pending, size = [], 0
        size += len(rest)
        if size > LONGEST_LINE:
            pending = []
        elif rest:
            pending.append(rest)
    if size:
        yield None if size > LONGEST_LINE else b"".join(pending)


def parse_line(number: int, line: bytes, text_key: str) -> Document | BadLine:
    """A line as a document, or as a bad line with its reason."""
    record, reason = None, ""
    try:
        record = orjson.loads(line)
    except (orjson.JSONDecodeError, RecursionError) as error:
        reason = json_problem(line, error)
    if not reason:
        reason = text_problem(record, text_key)
    if reason:
        return BadLine(number, reason, line[:EXCERPT].decode("utf-8", "replace"))
    assert isinstance(record, dict)
    return Document(number, record[text_key], record)


def json_problem(line: bytes, error: Exception) -> str:
    """Why a line is not JSON."""
    if not line.strip():
        return "empty line"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 (byte {wrong.start})"
    return f"not JSON ({error})"


def text_problem(record: Any, text_key: str) -> str:
    """Why a JSON value gives no text; empty where it does."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if text_key not in record:
        return f"no field {text_key!r}"
    if not isinstance(record[text_key], str):
        return f"field {text_key!r} is not a string"
    return "" if record[text_key].strip() else "empty text"
