"""Complete a model folder: config.json, tokenizer files and manifest; copy a whole model.

The manifest holds the digest of every file, the model's identity and its provenance. A copy is read back before it is
accepted. The caller provides a temporary folder and renames it.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megashear.config.model_shape import ModelShape
from megashear.errors import ModelError
from megashear.files import file_digests
from megashear.files.atomic import write_json
from megashear.hf.hf_config import NAME as CONFIG
from megashear.hf.hf_config import config_of_shape
from megashear.hf.model_folder import ModelFolder
from megashear.hf.safetensors_writer import ShardedWriter
from megashear.hf.tensor_names import tensor_shapes


def write_settings(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    config: dict[str, Any],
    extra_files: Iterable[Path],
) -> None:
    """Write config.json and copy the files that go with the weights.

    config: the source's, whose token ids and extra keys are kept. companions: tokenizer and licence files to copy.
    """
    write_json(folder / CONFIG, config_of_shape(shape, str(dtype).removeprefix("torch."), config))
    for path in extra_files:
        shutil.copyfile(path, folder / path.name)


def seal_folder(folder: Path, provenance: dict[str, Any]) -> ModelFolder:
    """Check that all tensors are written, read the folder back and write its manifest; nothing is added afterwards.

    provenance: where the model comes from, any JSON; `export/model_card.py` says which keys it reads. On one process,
    after all writers closed. Raises ModelError where the folder is not whole.
    """
    ShardedWriter.finish(folder)
    written = ModelFolder.open(folder)
    file_digests.write_manifest(folder, {"provenance": provenance, "model_digest": written.digest()})
    return ModelFolder.open(folder)


def copy_tensors(
    source: ModelFolder, folder: Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Copy all tensors of a model into a temporary folder, one at a time; dtype None keeps each tensor's own."""
    dtypes = source.dtypes if dtype is None else dict.fromkeys(source.dtypes, dtype)
    with ShardedWriter.create(folder, tensor_shapes(source.shape), dtypes, max_shard_bytes) as writer:
        for name in writer.places:
            try:
                writer.write(name, source.read(name))
            except ModelError as error:
                raise ModelError(f"{source.path}: {error}") from error


def check_same_model(source: ModelFolder, copy: ModelFolder) -> None:
    """Raises ModelError unless the copy, as read back from the disk, holds the source's very tensors."""
    if source.digest() != copy.digest():
        raise ModelError(f"{copy.path}: what was read back is not what {source.path} holds; check the disk, run again")
