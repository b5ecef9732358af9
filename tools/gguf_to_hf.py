"""Turn a LLaMA in GGUF form into a model folder (Hugging Face's form).

transformers reads and de-quantises the file (it needs the packages `gguf` and `accelerate`); this script mends what
that leaves undone: transformers will not save such a model, and the digit splitting of SmolLM's tokenizer is lost.
Weights that were quantised stay as coarse as they were: the folder serves trials, not as a release of that model.

    python tools/gguf_to_hf.py SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from megashear.errors import DataError, MegashearError, ModelError
from megashear.files.atomic import atomic_folder
from megashear.hf.finish_folder import seal_folder, write_settings
from megashear.hf.hf_config import shape_of_config
from megashear.hf.import_model import summary
from megashear.hf.model_folder import ModelFolder
from megashear.hf.safetensors_writer import ShardedWriter
from megashear.hf.tensor_names import tensor_shapes

DIGIT_SPLITTING = ("smollm",)
"""GGUF names (`tokenizer.ggml.pre`) of pre-tokenizers that split off each digit before the byte-level split."""


def convert(source: Path, output: Path, dtype: torch.dtype) -> ModelFolder:
    """Write the model folder `output` (it must not exist) from the GGUF file `source`; returns it opened.

    Raises ModelError: not a GGUF file, a package is missing, `output` exists, or not a LLaMA that we carry.
    """
    if not source.is_file():
        raise ModelError(f"{source}: no such file; give a GGUF file")
    if output.exists():
        raise ModelError(f"{output}: exists; remove it, or name another output")
    try:
        import accelerate  # noqa: F401 (transformers asks for it when it reads GGUF)
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(f"{error.name} is not installed; pip install gguf accelerate") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        field = GGUFReader(source).get_field("tokenizer.ggml.pre")
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source}: cannot be read as GGUF ({error}); download it again") from error
    if field is not None and field.contents() in DIGIT_SPLITTING:
        split_digits(tokenizer)
    with atomic_folder(output) as folder:
        write_model(model, source, folder)
        tokenizer.save_pretrained(folder)
        seal_folder(folder, {"source": {"path": source.name}})
    return ModelFolder.open(output)


def write_model(model: Any, source: Path, folder: Path) -> None:
    """Write weights and settings of a transformers model that came de-quantised from `source`."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "quantization_config"}
    shape = shape_of_config(config, source)
    tensors = model.state_dict()
    with ShardedWriter.create(folder, tensor_shapes(shape), model.dtype) as writer:
        for name in writer.places:
            writer.write(name, tensors[name])
    write_settings(folder, shape, model.dtype, config, [])
    model.generation_config.save_pretrained(folder)


def split_digits(tokenizer: Any) -> None:
    """Split off each digit before the byte-level split. Raises DataError where a token still joins digits."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    for text in ("123", "in 2024,", "  9 + 10"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = [tokenizer.decode([token]) for token in ids]
        if "".join(pieces) != text or any(len(piece) > 1 and any(map(str.isdigit, piece)) for piece in pieces):
            raise DataError(f"the tokenizer splits {text!r} into {pieces}; such a tokenizer in GGUF form is not known")


def main() -> int:
    """Command line: exit code 0, or that of the error, with one message."""
    parser = argparse.ArgumentParser(description="GGUF LLaMA -> Hugging Face folder")
    parser.add_argument("source", type=Path, help="GGUF file")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the weights")
    arguments = parser.parse_args()
    try:
        print(summary(convert(arguments.source, arguments.output, getattr(torch, arguments.dtype))))
    except MegashearError as error:
        print(f"gguf_to_hf: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
