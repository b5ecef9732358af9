"""Read a model folder: config.json, safetensors in one or several files, tokenizer files, manifest.

All headers are compared with the shape that config.json describes before any tensor is read; missing, extra or
mis-shaped tensors are refused by name, all at once. Pickles are never opened, and an index must not name files outside
the folder. A tensor, or the slice a rank owns, is read without the rest. The digest of a model covers what it computes,
independent of how tensors are spread over files.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.errors import ModelError
from megashear.files import file_digests
from megashear.hf import tensor_names
from megashear.hf.hf_config import NAME as CONFIG
from megashear.hf.hf_config import read_config, shape_of_config


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


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""dtypes of weights that are carried, by safetensors' names."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor stands, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor in the folder's safetensors (one file goes before an index, as in transformers).

    Raises ModelError: no safetensors, a damaged file or index, a tensor that the index promises elsewhere.
    """
    if (folder / SINGLE).exists():
        return _read_file(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise ModelError(_no_weights(folder))
    weight_map = _read_index(folder / INDEX)
    found: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ModelError(f"{folder / file}: missing; {INDEX} names it; download the folder again")
        entries = _read_file(folder / file)
        twice = sorted(set(entries) & set(found))
        if twice:
            raise ModelError(f"{folder / file}: tensor {twice[0]} stands in {found[twice[0]].file.name} too; ambiguous")
        found.update(entries)
    wrong = [
        f"{name} is not in {file}"
        for name, file in weight_map.items()
        if name not in found or found[name].file.name != file
    ]
    if wrong:
        raise ModelError(f"{folder / INDEX}: does not fit the files beside it:\n  " + "\n  ".join(wrong))
    return found


def _read_file(path: Path) -> dict[str, TensorEntry]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except Exception as error:  # safetensors raises errors of its own and the file system's
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}); it is truncated or damaged, restore it"
        ) from error
    foreign = [f"tensor {name} is {dtype}" for name, (dtype, _) in kinds.items() if dtype not in DTYPES]
    if foreign:
        raise ModelError(f"{path}: {'; '.join(foreign)}; carried are {', '.join(DTYPES)}; take unquantised weights")
    return {name: TensorEntry(path, DTYPES[dtype], shape) for name, (dtype, shape) in kinds.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = dict(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: damaged or not an index of safetensors ({error!r}); download it again") from error
    for tensor, file in names.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not plain:
            raise ModelError(
                f"{path}: index places tensor {tensor} in {file!r}, which is not a safetensors file of"
                " this folder; do not use this index"
            )
    return names


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: only pickled weights ({', '.join(pickles[:3])}), which can run code and are never opened;"
            " take the safetensors of this model, or convert them once with transformers:"
            " AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder}: neither {SINGLE} nor {INDEX}; download the weights of this model"


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer that a model folder may hold."""

COMPANION_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
"""Files that go where the weights go: how to sample, and the terms of use."""


class ModelFolder:
    """An opened LLaMA folder; make one with `ModelFolder.open`."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        shape: ModelShape,
        tensors: dict[str, TensorEntry],
        manifest: dict[str, Any],
    ) -> None:
        self.path = path
        self.config = config
        self.shape = shape
        self.tensors = tensors
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, digests: bool = False) -> "ModelFolder":
        """Open a folder and check it: config.json, the headers of every weights file, the manifest where there is one.

        digests: demand a manifest and compare the SHA-256 of every file with it (sizes are compared in any case).
        Raises ModelError with every missing, extra and mis-shaped tensor.
        """
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"{path}: no such folder; give a Hugging Face LLaMA folder or one that megashear wrote")
        manifest: dict[str, Any] = {}
        if digests or (path / file_digests.NAME).exists():
            manifest = file_digests.read_manifest(path, ModelError)
            file_digests.check_files(path, manifest, ModelError, digests=digests)
        config = read_config(path)
        shape = shape_of_config(config, path / CONFIG)
        folder = cls(path, config, shape, read_headers(path), manifest)
        folder._check_tensors()
        return folder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most parameters have."""
        counts: dict[torch.dtype, int] = {}
        for entry in self.tensors.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.count
        return max(counts, key=lambda dtype: counts[dtype])

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype of every tensor (some folders keep norms in fp32 beside bf16)."""
        return {name: entry.dtype for name, entry in self.tensors.items()}

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that stand in the folder."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    @property
    def companion_files(self) -> list[Path]:
        """Generation settings and terms of use that stand in the folder."""
        return [self.path / name for name in COMPANION_FILES if (self.path / name).is_file()]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the model comes from, as its maker wrote it in the manifest; empty for a foreign folder."""
        found: dict[str, Any] = self.manifest.get("provenance", {})
        return found

    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.count * entry.dtype.itemsize for entry in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, in the file's dtype.

        Its memory is the file's mapping, so its pages leave with the tensor: copy it, then drop it.
        """
        return self._read(name, ...)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of tensor `name` along `dim` (0 or 1); only their pages of the file are read.

        Memory as in `read`. Raises IndexError for a range outside the tensor.
        """
        entry = self.tensors[name]
        if not (0 <= dim < len(entry.shape) and 0 <= start <= stop <= entry.shape[dim]):
            raise IndexError(f"{name} {entry.shape}: no elements {start}..{stop} along dimension {dim}")
        return self._read(name, (slice(None),) * dim + (slice(start, stop),))

    def _read(self, name: str, part: Any) -> Tensor:
        entry = self.tensors[name]
        try:
            with safe_open(entry.file, framework="pt") as file:
                tensor: Tensor = file.get_slice(name)[part]
                return tensor
        except Exception as error:  # safetensors raises errors of its own and the file system's
            raise ModelError(f"{entry.file}: tensor {name} cannot be read ({error}); restore the file") from error

    def digest(self) -> str:
        """Identity of the model: SHA-256 over its shape and every tensor's name, dtype, size and bytes.

        It is the same however the tensors are spread over files. Taken from the manifest where there is one.
        """
        return self.manifest.get("model_digest") or model_digest(self.shape, self.tensors, self.read)

    def _check_tensors(self) -> None:
        """Compare the headers with the shape's tensors; drops harmless extras. Raises ModelError, all names at once."""
        expected = tensor_names.tensor_shapes(self.shape)
        if self.shape.tie_word_embeddings and tensor_names.OUTPUT in self.tensors and self._output_is_embedding():
            del self.tensors[tensor_names.OUTPUT]
        self.tensors = {name: entry for name, entry in self.tensors.items() if not tensor_names.is_harmless(name)}
        problems = [f"missing tensor {name} {size}" for name, size in expected.items() if name not in self.tensors]
        for name, entry in self.tensors.items():
            if name not in expected:
                problems.append(f"extra tensor {name} {entry.shape}" + _extra_reason(name, self.shape))
            elif entry.shape != expected[name]:
                problems.append(f"tensor {name} is {entry.shape}, config.json asks for {expected[name]}")
        if problems:
            raise ModelError(
                f"{self.path}: the weights do not fit config.json:\n  " + "\n  ".join(problems) + "\n"
                "download or make the folder again, or correct config.json"
            )
        self.tensors = {name: self.tensors[name] for name in expected}

    def _output_is_embedding(self) -> bool:
        """Whether lm_head of a tied model holds the embedding's very values (compared 1024 rows at a time)."""
        embedding, output = self.tensors.get(tensor_names.EMBEDDING), self.tensors[tensor_names.OUTPUT]
        if embedding is None or (embedding.shape, embedding.dtype) != (output.shape, output.dtype):
            return False
        rows = range(0, output.shape[0], 1024)
        ends = [(start, min(start + 1024, output.shape[0])) for start in rows]
        return all(
            torch.equal(self.read_slice(tensor_names.EMBEDDING, 0, *end), self.read_slice(tensor_names.OUTPUT, 0, *end))
            for end in ends
        )


def _extra_reason(name: str, shape: ModelShape) -> str:
    if name == tensor_names.OUTPUT and shape.tie_word_embeddings:
        return ": config.json ties the output layer to the embedding, but their values differ"
    return ""
