"""Where each tensor of a model will stand: shards, offsets and headers of safetensors files, planned in advance.

Key properties: the order of a header (wide dtypes first, then names) and its padding are those of the safetensors
library, and shards are filled in the order of names given, as transformers fills them, so that a folder written here
equals one saved by transformers byte for byte. Read next: `writer.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megashear.weights.headers import DTYPES, SINGLE

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
