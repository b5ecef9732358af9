"""Export a model folder, or a run's last model, as a Hugging Face folder.

Holds one tensor in memory at a time. The output gets its name after the files were read back, loaded by transformers,
and their logits compared with ours.
"""

from pathlib import Path
from typing import Any

import torch

from megashear.errors import ModelError
from megashear.files.atomic import atomic_folder, write_json, write_text
from megashear.files.file_digests import NAME as MANIFEST
from megashear.hf.finish_folder import check_same_model, copy_tensors, seal_folder, write_settings
from megashear.hf.hf_config import NAME as CONFIG
from megashear.hf.import_model import summary
from megashear.hf.model_card import model_card
from megashear.hf.model_folder import ModelFolder
from megashear.hf.verify_export import verify_export

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""dtypes of an export, by their names in a run file."""

FINAL = "final"
"""Folder of a run that holds its finished model."""


def export_model(model: Path, output: Path, dtype: str | None = None, max_shard_gb: float = 5.0) -> None:
    """Write a Hugging Face folder from a model folder or run folder, verify it, and print a summary.

    An `output` that already holds this export is kept.

    Args:
        model: Model folder or run folder.
        output: Folder to write.
        dtype: fp32, bf16 or fp16; None: that of each tensor.
        max_shard_gb: Largest safetensors file in 10^9 bytes.

    Raises:
        ModelError: There is no finished model, `output` holds something else, or verification fails; then `output` is
            not created.
        StorageError: The disk is full.
    """
    source, output = open_final(Path(model)), Path(output)
    kind = None if dtype is None else DTYPES[dtype]
    provenance = {**source.provenance, "export": {"model_digest": source.digest(), "dtype": dtype}}
    if output.exists():
        print(summary(_already_exported(output, provenance)) + f"\n{output}: already exported")
        return
    with atomic_folder(output) as folder:
        write_export(source, folder, kind, max_shard_gb, provenance)
        difference = verify_export(folder, source, kind)
    print(summary(ModelFolder.open(output)))
    print(f"proof      loaded by transformers, logits within {difference:.1e} of the largest")


def write_export(
    source: ModelFolder, folder: Path, dtype: torch.dtype | None, max_shard_gb: float, provenance: dict[str, Any]
) -> None:
    """Write all files of an export into a temporary folder and read them back, one tensor in memory at a time."""
    copy_tensors(source, folder, dtype, max(1, int(max_shard_gb * 10**9)))
    kind = dtype or source.dtype
    write_settings(folder, source.shape, kind, source.config, source.tokenizer_files + source.companion_files)
    generation = folder / "generation_config.json"
    if not generation.exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(generation, {key: source.config[key] for key in keys if source.config.get(key) is not None})
    write_text(folder / "README.md", model_card(source.shape, str(kind).removeprefix("torch."), provenance))
    sealed = seal_folder(folder, provenance)
    if dtype is None:
        check_same_model(source, sealed)


def open_final(path: Path) -> ModelFolder:
    """Open the model folder at `path`, or the finished model of the run folder. Raises ModelError for neither."""
    if (path / CONFIG).is_file():
        return ModelFolder.open(path, digests=(path / MANIFEST).is_file())
    if (path / FINAL / CONFIG).is_file():
        return ModelFolder.open(path / FINAL, digests=True)
    raise ModelError(
        f"{path}: neither a model folder ({CONFIG}) nor a run with a finished model ({FINAL}/{CONFIG});"
        " give one, or finish the run (`megashear run`)"
    )


def _already_exported(output: Path, provenance: dict[str, Any]) -> ModelFolder:
    try:
        there = ModelFolder.open(output, digests=True)
    except ModelError:
        there = None
    if there is None or there.provenance != provenance:
        raise ModelError(f"{output}: exists and is not this export; remove it, or name another output")
    return there
