"""Write safetensors one tensor at a time, in any order, from several processes.

The safetensors library saves a dict of tensors that are all in memory. Here the files are laid out first (headers
written, space reserved), and each tensor is written at its offset. Order and padding of headers are those of the
library, and shards are filled as transformers fills them, so the result is equal byte for byte.

One rank: `create`. Other ranks, after a barrier: `open`. Each rank: `write` its tensors, then `close`. One rank, after
a barrier: `finish`, which checks that every tensor was written once.
"""

import errno
import json
import math
import os
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.errors import ModelError
from megashear.files.atomic import storage_error, write_json
from megashear.hf.model_folder import DTYPES, INDEX, SINGLE, raw_bytes

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
"""safetensors' name of each dtype; the order of DTYPES is its order of headers."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes stand in a file; `offset` is absolute, in bytes."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(
    shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], max_shard_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensors in it, filled in the order given; a tensor above the limit has a file of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        if size > max_shard_bytes:
            shards.append([name])
            continue
        if filled + size > max_shard_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    shards = [shard for shard in [*shards, current] if shard]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def encode_header(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> tuple[bytes, int]:
    """The header of a file that holds these tensors (length prefix included), and the bytes of data that follow it."""
    rank = {dtype: i for i, dtype in enumerate(KINDS)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes, key=lambda name: (rank[dtypes[name]], name)):
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": KINDS[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def read_places(folder: Path) -> dict[str, Place]:
    """Name -> place of every tensor in the files that the writer laid out in `folder`."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                places[name] = Place(path.name, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places


def index_of(
    shards: dict[str, list[str]], shapes: dict[str, tuple[int, ...]], places: dict[str, Place]
) -> dict[str, Any]:
    """Content of `model.safetensors.index.json`: sizes and name -> file, as transformers writes it."""
    metadata = {
        "total_parameters": sum(math.prod(shape) for shape in shapes.values()),
        "total_size": sum(place.bytes for place in places.values()),
    }
    return {"metadata": metadata, "weight_map": {name: file for file, names in shards.items() for name in names}}


_WRITTEN = ".written"
_PIECE = 16 << 20  # bytes converted or written at once


class ShardedWriter:
    """Writes tensors into the laid-out files of one folder; make one with `create` or `open`."""

    def __init__(self, folder: Path, places: dict[str, Place]) -> None:
        self.folder = folder
        self.places = places
        self._files: dict[str, int] = {}
        # Names written by this process; read by `finish`, which may run on another host.
        self._log = os.open(folder / f"{_WRITTEN}.{uuid.uuid4().hex}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @classmethod
    def create(
        cls,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype | dict[str, torch.dtype],
        max_shard_bytes: int = 5 * 10**9,
    ) -> "ShardedWriter":
        """Lay out the files of these tensors in the existing, temporary `folder` and reserve their space on the disk.

        dtype: of all tensors, or of each. max_shard_bytes: data bytes per file; a larger tensor has a file of its own.
        Raises StorageError where the space is not there.
        """
        dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(shapes, dtype)
        shards = plan_shards(shapes, dtypes, max_shard_bytes)
        for file, names in shards.items():
            header, size = encode_header({name: shapes[name] for name in names}, dtypes)
            _reserve(folder / file, header, size)
        places = read_places(folder)
        if list(shards) != [SINGLE]:
            write_json(folder / INDEX, index_of(shards, shapes, places))
        return cls(folder, places)

    @classmethod
    def open(cls, folder: Path) -> "ShardedWriter":
        """Join a folder that another process laid out with `create`."""
        return cls(Path(folder), read_places(Path(folder)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor (any device) to its place, converted to the dtype laid out, 16 MiB at a time.

        Raises ModelError for another shape than laid out or for non-finite values, StorageError where the write fails.
        """
        place = self.places[name]
        if tuple(tensor.shape) != place.shape:
            raise ModelError(f"tensor {name} is {tuple(tensor.shape)}, laid out as {place.shape}")
        rows = tensor.detach() if tensor.dim() > 1 else tensor.detach().unsqueeze(-1)
        step = max(1, _PIECE // max(1, rows.shape[1] * place.dtype.itemsize))
        offset = place.offset
        for piece in rows.split(step):
            piece = piece.to(device="cpu", dtype=place.dtype)
            if not torch.stack(torch.aminmax(piece)).isfinite().all():
                raise ModelError(
                    f"tensor {name} holds NaN or infinity in {place.dtype}; such a model is not written:"
                    " take undamaged weights, or a wider dtype"
                )
            offset = self._write_at(place.file, raw_bytes(piece), offset)
        os.write(self._log, f"{name}\n".encode())

    def close(self) -> None:
        """Flush what this process wrote and let go of the files; every process calls it, before `finish`."""
        for descriptor in [*self._files.values(), self._log]:
            os.fsync(descriptor)
            os.close(descriptor)
        self._files = {}

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def finish(folder: Path) -> None:
        """Check, on one process after all have closed, that every tensor was written exactly once.

        Raises ModelError with the names that were not, or were written twice.
        """
        logs = sorted(folder.glob(f"{_WRITTEN}.*"))
        written = Counter(name for log in logs for name in log.read_text(encoding="utf-8").splitlines())
        expected = read_places(folder)
        problems = [f"{name}: never written" for name in expected if name not in written]
        problems += [f"{name}: written {times} times" for name, times in written.items() if times > 1]
        if problems:
            raise ModelError(f"{folder}: the weights are not whole; write them again:\n  " + "\n  ".join(problems))
        for log in logs:
            log.unlink()

    def _write_at(self, file: str, data: memoryview, offset: int) -> int:
        """Write bytes at an absolute offset; returns the offset behind them."""
        path = self.folder / file
        try:
            if file not in self._files:
                self._files[file] = os.open(path, os.O_WRONLY)
            while data:
                count = os.pwrite(self._files[file], data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise storage_error(error, path) from error
        return offset


def _reserve(path: Path, header: bytes, size: int) -> None:
    """A new file of the header and `size` bytes, whose blocks are taken now rather than at the last tensor."""
    try:
        with open(path, "xb") as file:
            file.write(header)
            file.flush()
            if size:
                _allocate(file.fileno(), len(header), size)
    except OSError as error:
        raise storage_error(error, path) from error


def _allocate(descriptor: int, offset: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, offset, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, offset + size)  # a file system that cannot reserve
