"""Import a Hugging Face LLaMA folder as a verified copy.

Holds one tensor in memory at a time; nothing is converted. The copy gets its name after its tensors were compared with
the source's by digest.
"""

from dataclasses import asdict
from pathlib import Path

from megashear.errors import ModelError
from megashear.files.atomic import atomic_folder
from megashear.hf.finish_folder import check_same_model, copy_tensors, seal_folder, write_settings
from megashear.hf.model_folder import ModelFolder


def import_model(source: Path, output: Path) -> None:
    """Copy a Hugging Face LLaMA folder to a model folder, and print a summary.

    An `output` that already holds this model is kept.

    Args:
        source: Hugging Face folder.
        output: Model folder to write.

    Raises:
        ModelError: The source is not a supported LLaMA or not complete, or `output` holds something else.
        StorageError: The disk is full.
    """
    source, output = Path(source), Path(output)
    model = ModelFolder.open(source)
    if output.exists():
        imported = _already_imported(model, output)
        print(f"{output}: already holds this model")
    else:
        with atomic_folder(output) as folder:
            copy_tensors(model, folder)
            write_settings(
                folder, model.shape, model.dtype, model.config, model.tokenizer_files + model.companion_files
            )
            provenance = model.provenance or {"source": {"path": str(source), "shape": asdict(model.shape)}}
            check_same_model(model, seal_folder(folder, provenance))
        imported = ModelFolder.open(output)
    print(summary(imported))


def summary(model: ModelFolder) -> str:
    """Summary of a model: shape, parameters, dtype, size on disk, tokenizer, digest."""
    shape = model.shape
    tokenizer = ", ".join(path.name for path in model.tokenizer_files) or "none found"
    return "\n".join(
        [
            f"model      {model.path}",
            f"shape      {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} heads of"
            f" {shape.head_dim} in {shape.num_query_groups} groups, intermediate {shape.intermediate_size}, vocabulary"
            f" {shape.vocab_size}{', tied' if shape.tie_word_embeddings else ''}",
            f"parameters {shape.parameters():,}",
            f"weights    {str(model.dtype).removeprefix('torch.')}, {model.bytes():,} bytes",
            f"tokenizer  {tokenizer}",
            f"digest     {model.digest()}",
        ]
    )


def _already_imported(model: ModelFolder, output: Path) -> ModelFolder:
    """Open `output`, which must be this model with the same tokenizer. Raises ModelError otherwise."""
    try:
        there = ModelFolder.open(output, digests=True)
        same = there.digest() == model.digest() and _contents(there) == _contents(model)
    except ModelError:
        same = False
    if not same:
        raise ModelError(f"{output}: exists and does not hold this model; remove it, or name another output")
    return there


def _contents(model: ModelFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.tokenizer_files}
