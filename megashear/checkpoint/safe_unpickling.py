"""Refuse pickles in checkpoint metadata that could execute code.

torch's distributed format stores metadata as a pickle. Before megatron-core reads a folder, the pickle is inspected
with an unpickler that knows the few classes it consists of and refuses any other name. Other files of the folder are
read with `torch.load(weights_only=True)`.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from megashear.errors import CheckpointError

# What torch.distributed.checkpoint and megatron-core write: plain data classes, enums, sizes and dtypes. Nothing here
# acts when made. Not here on purpose: BytesStorageMetadata, for torch unpickles whatever it declares.
ALLOWED = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _Inspector(pickle.Unpickler):
    """An unpickler that resolves allowed names only."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise CheckpointError(
                f"{self.path}: names {module}.{name}, which no checkpoint of megashear holds and which could run code; "
                "do not use it"
            )
        return super().find_class(module, name)

    def persistent_load(self, identity: Any) -> Any:
        return identity


def refuse_foreign_pickles(folder: Path) -> None:
    """Raise CheckpointError where metadata below `folder` is damaged or names anything beyond plain data."""
    for path in sorted(folder.rglob("*")):
        if path.name == ".metadata":
            _inspect(path.read_bytes(), path)


def _inspect(data: bytes, path: Path) -> None:
    try:
        _Inspector(data, path).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an older checkpoint") from error
