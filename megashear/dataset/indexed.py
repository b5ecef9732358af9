"""Megatron's `.bin`/`.idx` pair: token ids of documents, and the position of each document.

Layout of `.idx`, little endian: magic (9 bytes), version 1 (u64), dtype code (u8), sequences n (u64), document bounds d
(u64), then n lengths (i32), n byte offsets (i64), d bounds (i64). We write one sequence per document, so d = n + 1.
Files of megatron-core's tools open here, and ours open there. Opening reads the header and the last entry only; writing
holds no table of documents in memory.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megashear.dataset.block_digests import BlockDigests, CheckedArray, CheckedFile
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
    number; `sequences`, the entries of the index; `lengths`, tokens per sequence, int32 [sequences]; `offsets`, first
    byte of each sequence in the `.bin` file, int64 [sequences]; `bounds`, first sequence of each document and the end,
    int64 [documents + 1]. All are memory-mapped and read-only; taking from them raises DataError where the digests say
    that the file is damaged.
    """

    def __init__(self, prefix: Path, digests: BlockDigests | None = None) -> None:
        """prefix: path without `.bin`/`.idx`; digests: of the pair's blocks, to be compared with what is read.

        Raises DataError where a file is missing, damaged or of another size.
        """
        self.bin_path, self.idx_path = pair(Path(prefix))
        try:
            if digests is None:
                bin_file, self._idx = CheckedFile(self.bin_path), CheckedFile(self.idx_path)
            else:
                bin_file = CheckedFile(self.bin_path, digests.bin_size, digests.bin_crc_B, digests.block)
                self._idx = CheckedFile(self.idx_path, digests.idx_size, digests.idx_crc_B, digests.block)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make the dataset again") from error
        self._read_header()
        end = self._last_end()
        if end != bin_file.size:
            raise DataError(
                f"{self.bin_path}: {bin_file.size} bytes, its index says {end}; the file is truncated or changed, "
                "make it again"
            )
        self.tokens = CheckedArray(bin_file, self.dtype, 0, bin_file.size // self.dtype.itemsize)

    def _read_header(self) -> None:
        """Read the 34 bytes of the header, compare the index's size with them, and map its columns."""
        self._idx.check(0, min(HEADER.size, self._idx.size))
        header = self._idx.bytes[: HEADER.size].tobytes()
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
        self.documents: int = max(bounds - 1, 0)
        expected = HEADER.size + 12 * self.sequences + 8 * bounds
        if self._idx.size != expected:
            raise DataError(
                f"{self.idx_path}: {self._idx.size} bytes, its header says {expected}; the file is truncated or changed"
            )
        offsets, ends = HEADER.size + 4 * self.sequences, HEADER.size + 12 * self.sequences
        self.lengths = CheckedArray(self._idx, np.dtype("<i4"), HEADER.size, self.sequences)
        self.offsets = CheckedArray(self._idx, np.dtype("<i8"), offsets, self.sequences)
        self.bounds = CheckedArray(self._idx, np.dtype("<i8"), ends, bounds)

    def _last_end(self) -> int:
        """Where the last sequence ends in the `.bin` file, in bytes."""
        if self.sequences == 0:
            return 0
        length, offset = int(self.lengths[-1]), int(self.offsets[-1])
        if length < 0 or offset < 0 or offset % self.dtype.itemsize:
            raise DataError(f"{self.idx_path}: impossible last entry; the file is damaged, make the dataset again")
        return offset + length * self.dtype.itemsize

    @property
    def blocks(self) -> int:
        """Blocks of both files that have digests."""
        return self.tokens.file.blocks + self._idx.blocks

    def check_blocks(self, numbers: Iterable[int] | None) -> None:
        """Compare blocks with their digests, those of the `.bin` first; None: all. Raises DataError."""
        for number in range(self.blocks) if numbers is None else numbers:
            first = number < self.tokens.file.blocks
            file, place = (self.tokens.file, number) if first else (self._idx, number - self.tokens.file.blocks)
            file.check(place * file.block, min((place + 1) * file.block, file.size))

    def release(self) -> None:
        """Give back the memory of both files' parts that were read."""
        self.tokens.file.release()
        self._idx.release()

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, [tokens]; raises DataError where the index points out of the `.bin` file."""
        first, last = (int(bound) for bound in self.bounds[number : number + 2])
        if first >= last:
            return self.tokens[0:0]
        start = int(self.offsets[first]) // self.dtype.itemsize
        stop = int(self.offsets[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        if not 0 <= start <= stop <= len(self.tokens):
            raise DataError(f"{self.idx_path}: document {number} lies outside of the tokens; the file is damaged")
        return self.tokens[start:stop]


class IndexedWriter:
    """Writes a pair document by document; a context manager, the index is whole at its end.

    Attributes: `documents`, `tokens` so far. The files are not renamed here: write into a folder of `files.atomic`.
    OSErrors of the disk pass through.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        """prefix: path without `.bin`/`.idx`; dtype: see `token_dtype`."""
        self.bin_path, self.idx_path = pair(Path(prefix))
        self.dtype = np.dtype(dtype)
        self.documents = self.tokens = 0
        self._bin: BinaryIO
        self._idx: BinaryIO

    def __enter__(self) -> "IndexedWriter":
        self._bin, self._idx = open(self.bin_path, "wb"), open(self.idx_path, "wb+")
        self._idx.write(bytes(HEADER.size))
        return self

    def add_document(self, ids: np.ndarray) -> None:
        """Append one document. ids: [tokens] of any integer dtype, within the vocabulary."""
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).data)
        self._idx.write(len(ids).to_bytes(4, "little"))
        self.documents += 1
        self.tokens += len(ids)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._bin, self._idx:
            if kind is None:
                self._finish()
        if kind is not None:
            self.idx_path.unlink()

    def _finish(self) -> None:
        """Complete the index: the lengths stand there already."""
        finish_index(self._idx, self.dtype, self.documents)


def write_index(path: Path, dtype: np.dtype, pieces: Iterable[np.ndarray]) -> None:
    """Write the `.idx` of documents of these lengths in tokens, any integer dtype [documents], piece after piece.

    The pieces are taken once, and what is written is read back for the columns after them: memory holds one piece.
    OSErrors of the disk pass through.
    """
    documents = 0
    with open(path, "wb+") as file:
        file.write(bytes(HEADER.size))
        for length_C in pieces:
            file.write(np.ascontiguousarray(length_C, dtype="<i4").data)
            documents += len(length_C)
        finish_index(file, dtype, documents)


def finish_index(file: BinaryIO, dtype: np.dtype, documents: int) -> None:
    """Complete an index that ends with its lengths: byte offsets int64 [documents], then bounds int64 [documents + 1],
    then the header at its beginning. file: opened for reading and writing, at its end.
    """
    file.flush()
    size, end, steps_C = np.dtype(dtype).itemsize, 0, np.arange(CHUNK, dtype="<i8")
    for start in range(0, documents, CHUNK):
        count = min(CHUNK, documents - start)
        byte_C = np.frombuffer(os.pread(file.fileno(), 4 * count, HEADER.size + 4 * start), "<i4").astype("<i8")
        byte_C *= size
        end_C = np.cumsum(byte_C)
        end_C += end
        end = int(end_C[-1])
        end_C -= byte_C
        file.write(end_C.data)
    for start in range(0, documents + 1, CHUNK):
        file.write((steps_C[: documents + 1 - start] + start).data)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[np.dtype(dtype)], documents, documents + 1))
