"""Megatron's `.bin`/`.idx` pair: token ids of documents, back to back, and where each document lies.

Layout of `.idx`, little endian: magic (9 bytes), version 1 (u64), dtype code (u8), sequences n (u64), document bounds d
(u64), then n lengths (i32), n byte offsets (i64), d bounds (i64). We write one sequence per document, so d = n + 1. Key
properties: files of megatron-core's tools open here and ours open there; opening reads 34 bytes and the last entry,
whatever the number of documents; writing holds 4 bytes per document. Read next: `manifest.py`.
"""

import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megashear.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
CHUNK = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token ids on disk: uint16 below 65 500 ids, else int32 (megatron-core's rule)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def pair(prefix: Path) -> tuple[Path, Path]:
    """The paths of the `.bin` and the `.idx` file of a prefix (a prefix may hold dots)."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class IndexedTokens:
    """A pair opened for reading.

    Attributes: `tokens` [tokens] (memory-mapped, uint16 or int32), the stream of all documents; `documents`, their
    number.
    """

    def __init__(self, prefix: Path) -> None:
        """prefix: path without `.bin`/`.idx`. Raises DataError where a file is missing, damaged or of another size."""
        self.bin_path, self.idx_path = pair(Path(prefix))
        try:
            self._read_header()
            bin_size = self.bin_path.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make the dataset again") from error
        end = self._last_end()
        if end != bin_size:
            raise DataError(
                f"{self.bin_path}: {bin_size} bytes, its index says {end}; the file is truncated or changed, "
                "make it again"
            )
        shape = (bin_size // self.dtype.itemsize,)
        self.tokens: np.ndarray = (
            np.memmap(self.bin_path, dtype=self.dtype, mode="r", shape=shape) if bin_size else np.empty(0, self.dtype)
        )

    def _read_header(self) -> None:
        """Read the 34 bytes of the header and compare the index's size with them."""
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{self.idx_path}: not the index of a Megatron dataset, or truncated; make the dataset again"
            )
        _, version, code, self.sequences, bounds = HEADER.unpack(header)
        dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
        if version != 1 or code not in dtypes:
            raise DataError(
                f"{self.idx_path}: version {version}, dtype code {code}; version 1 with uint16 (8) or int32 (4) "
                "can be read"
            )
        self.dtype = dtypes[code].newbyteorder("<")
        self.documents = max(bounds - 1, 0)
        expected = HEADER.size + 12 * self.sequences + 8 * bounds
        size = self.idx_path.stat().st_size
        if size != expected:
            raise DataError(
                f"{self.idx_path}: {size} bytes, its header says {expected}; the file is truncated or changed"
            )

    def _last_end(self) -> int:
        """Where the last sequence ends in the `.bin` file, in bytes."""
        if self.sequences == 0:
            return 0
        length, offset = self.lengths()[-1], self.offsets()[-1]
        if length < 0 or offset < 0 or offset % self.dtype.itemsize:
            raise DataError(f"{self.idx_path}: impossible last entry; the file is damaged, make the dataset again")
        return int(offset) + int(length) * self.dtype.itemsize

    def _column(self, dtype: str, start: int, count: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self.idx_path, dtype=dtype, mode="r", offset=start, shape=(count,))

    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int32 [sequences], memory-mapped."""
        return self._column("<i4", HEADER.size, self.sequences)

    def offsets(self) -> np.ndarray:
        """First byte of each sequence in the `.bin` file, int64 [sequences], memory-mapped."""
        return self._column("<i8", HEADER.size + 4 * self.sequences, self.sequences)

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document of a pair with one sequence per document (as we write them)."""
        start = int(self.offsets()[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths()[number])]


class IndexedWriter:
    """Writes a pair document by document; a context manager, the index is written at its end.

    The files are not renamed here: write into a folder of `files.atomic`. OSErrors of the disk pass through.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        """prefix: path without `.bin`/`.idx`; dtype: see `token_dtype`."""
        self.bin_path, self.idx_path = pair(Path(prefix))
        self.dtype = np.dtype(dtype)
        self.lengths = array("i")
        self.tokens = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "IndexedWriter":
        self._file = open(self.bin_path, "wb")
        return self

    def add_document(self, ids: np.ndarray) -> None:
        """Append one document. ids: [tokens] of any integer dtype, within the vocabulary."""
        assert self._file is not None
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).data)
        self.lengths.append(len(ids))
        self.tokens += len(ids)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None:
            length_N = np.frombuffer(self.lengths, dtype=np.intc) if self.lengths else np.empty(0, np.intc)
            write_index(self.idx_path, self.dtype, length_N)


def write_index(path: Path, dtype: np.dtype, length_N: np.ndarray) -> None:
    """Write the `.idx` of documents of these lengths in tokens, int32 [documents], in pieces: memory does not grow."""
    count, size = len(length_N), np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[np.dtype(dtype)], count, count + 1))
        for start in range(0, count, CHUNK):
            file.write(length_N[start : start + CHUNK].astype("<i4", copy=False).data)
        end = 0
        for start in range(0, count, CHUNK):
            end_N = end + np.cumsum(length_N[start : start + CHUNK], dtype=np.int64) * size
            file.write(np.concatenate([[end], end_N[:-1]]).astype("<i8", copy=False).data)
            end = int(end_N[-1])
        for start in range(0, count + 1, CHUNK):
            file.write(np.arange(start, min(start + CHUNK, count + 1), dtype="<i8").data)
