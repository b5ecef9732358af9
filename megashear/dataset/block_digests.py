"""Block checksums of a pair, and reading with verification.

`<pair>.crc`, little endian: magic (8 bytes), block size (u32), size of `.bin` and of `.idx` (u64 each), then CRC-32 of
every block of the `.bin`, then of the `.idx` (u32 each). A block is verified once, when it is first read, so opening is
free and a damaged byte is never returned. CRC-32 detects damage, not tampering; `tools/verify_data.py` compares
SHA-256.
"""

import hashlib
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from megashear.errors import DataError

MAGIC = b"MSBLOCK1"
HEADER = struct.Struct("<8sIQQ")
BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class FileDigests:
    """A file's size in bytes, its SHA-256 in hexadecimal, and CRC-32 of every block, uint32 [blocks]."""

    size: int
    sha256: str
    crc_B: np.ndarray


def digest_file(path: Path, block: int = BLOCK) -> FileDigests:
    """Read a file once for all its digests. OSErrors pass through."""
    whole, found, size = hashlib.sha256(), [], 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(block):
            while len(chunk) < block and (more := file.read(block - len(chunk))):
                chunk += more
            whole.update(chunk)
            found.append(zlib.crc32(chunk))
            size += len(chunk)
    return FileDigests(size, whole.hexdigest(), np.array(found, dtype="<u4"))


@dataclass(frozen=True)
class BlockDigests:
    """What a `.crc` file holds: block size, and of both files of a pair the size and CRC-32 of every block."""

    block: int
    bin_size: int
    idx_size: int
    bin_crc_B: np.ndarray
    idx_crc_B: np.ndarray


def crc_path(prefix: Path) -> Path:
    """The path of a pair's block digests."""
    return prefix.with_name(prefix.name + ".crc")


def write_block_digests(prefix: Path, bin_file: FileDigests, idx_file: FileDigests, block: int = BLOCK) -> Path:
    """Write the `.crc` file of a pair; returns its path."""
    path = crc_path(prefix)
    header = HEADER.pack(MAGIC, block, bin_file.size, idx_file.size)
    path.write_bytes(header + bin_file.crc_B.tobytes() + idx_file.crc_B.tobytes())
    return path


def read_block_digests(prefix: Path, sha256: str) -> BlockDigests:
    """The block digests of a pair; raises DataError where the file is missing or its SHA-256 is not the given one."""
    path = crc_path(prefix)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it, or make the dataset again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: its SHA-256 is not the manifest's; the file is damaged or changed")
    magic, block, bin_size, idx_size = HEADER.unpack(content[: HEADER.size])
    counts = [-(-size // block) for size in (bin_size, idx_size)]
    crc_B = np.frombuffer(content, dtype="<u4", offset=HEADER.size)
    if magic != MAGIC or len(crc_B) != sum(counts):
        raise DataError(f"{path}: not a file of block digests; make the dataset again")
    return BlockDigests(block, bin_size, idx_size, crc_B[: counts[0]], crc_B[counts[0] :])


class CheckedFile:
    """A file mapped into memory, read-only; a block is compared with its CRC-32 when it is first touched."""

    def __init__(
        self, path: Path, size: int | None = None, crc_B: np.ndarray | None = None, block: int = BLOCK
    ) -> None:
        """size: what the file must have; crc_B: uint32 [blocks], None where nothing is to be compared.

        Raises DataError where the file is of another size; OSErrors pass through.
        """
        self.path, self.block, self.crc_B = path, block, crc_B
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if size is not None and size != self.size:
                raise DataError(
                    f"{path}: {self.size} bytes, its digests are of {size}; the file is truncated or changed"
                )
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        self.bytes = np.frombuffer(self._mapped or b"", dtype=np.uint8)
        self.blocks = -(-self.size // block)
        self._good = bytearray(self.blocks) if crc_B is not None else bytearray(b"\1" * self.blocks)

    def check(self, start: int, stop: int) -> None:
        """Compare the blocks of these bytes that were not compared before; raises DataError by file and place."""
        if stop <= start:
            return
        first, last, good = start // self.block, (stop - 1) // self.block, self._good
        if good[first] and good[last] and (last - first < 2 or all(good[first:last])):
            return
        for number in range(first, last + 1):
            if not good[number]:
                self._check_block(number)

    def release(self) -> None:
        """Give back the memory of what was read; touching it again reads it from the page cache or the disk."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _check_block(self, number: int) -> None:
        assert self.crc_B is not None
        start, stop = number * self.block, min((number + 1) * self.block, self.size)
        # A file cut since it was opened: touching what is gone would end the process.
        if os.stat(self.path).st_size != self.size:
            raise DataError(f"{self.path}: its size has changed since it was opened; restore the file")
        if zlib.crc32(self.bytes[start:stop].data) != self.crc_B[number]:
            raise DataError(f"{self.path}: bytes {start} to {stop} are damaged; restore the file or make it again")
        self._good[number] = 1


class CheckedArray:
    """A one-dimensional array in a `CheckedFile`: what is taken from it has been compared with its digests.

    Slices are views of the mapping: they cost no copy and outlive this object.
    """

    def __init__(self, file: CheckedFile, dtype: np.dtype, offset: int, count: int) -> None:
        """offset: of the first element, in bytes; count: elements."""
        self.file, self.dtype, self.shape, self._offset = file, np.dtype(dtype), (count,), offset
        self._array = np.frombuffer(file.bytes, dtype=self.dtype, count=count, offset=offset if count else 0)
        self._size = self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, key: slice) -> np.ndarray: ...

    @overload
    def __getitem__(self, key: Any) -> Any: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(self.shape[0])
            if step < 0:
                start, stop = stop + 1, start + 1
            self.file.check(self._offset + start * self._size, self._offset + stop * self._size)
        elif isinstance(key, int | np.integer):
            at = self._offset + (int(key) % max(self.shape[0], 1)) * self._size
            self.file.check(at, at + self._size if self.shape[0] else at)
        else:
            self.check_all()
        return self._array[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)

    def check_all(self) -> None:
        """Compare every block."""
        self.file.check(self._offset, self._offset + self.shape[0] * self._size)
