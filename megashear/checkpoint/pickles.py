"""Reading a checkpoint must not run code, although torch's distributed format keeps its metadata as a pickle.

Before megatron-core reads a folder, every pickle in it is gone through with an unpickler that knows the few classes
which such metadata consists of and refuses every other name. Read next: `store.py`.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from megashear.errors import CheckpointError

# What torch.distributed.checkpoint and megatron-core write: plain data classes, sizes and dtypes. Nothing here acts
# when made.
ALLOWED = {
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool", "device"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.planner": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint._fsspec_filesystem": {"_StorageInfo"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
    "megatron.core.dist_checkpointing.core": None,
}


class _Inspector(pickle.Unpickler):
    """An unpickler that resolves allowed names only."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        names = ALLOWED.get(module, set())
        if names is not None and name not in names:
            raise CheckpointError(
                f"{self.path}: names {module}.{name}, which no checkpoint of megashear holds; it could run code, "
                "do not use it"
            )
        return super().find_class(module, name)

    def persistent_load(self, identity: Any) -> Any:
        return identity


def refuse_foreign_pickles(folder: Path) -> None:
    """Raise CheckpointError where a pickle below `folder` names anything beyond plain metadata."""
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
