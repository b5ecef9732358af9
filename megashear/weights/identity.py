"""The identity of a model: one digest over what it computes, however its tensors are spread over files.

Read next: `folder.py` (`ModelFolder.digest`), `finish.py` (where it is written down).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megashear.config.shape import ModelShape


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes in row order, in hexadecimal."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def model_digest(shape: ModelShape, tensors: dict[str, Any], read: Callable[[str], Tensor]) -> str:
    """SHA-256 over the shape and, by name, each tensor's name, dtype, size and bytes; `read` gives one at a time."""
    whole = hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = read(name)
        whole.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} {tensor_digest(tensor)}".encode())
    return whole.hexdigest()
