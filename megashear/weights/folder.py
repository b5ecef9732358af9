"""Reading a model folder: config.json, safetensors in one file or several, tokenizer files, perhaps a manifest.

Key properties: all headers are compared with the shape that config.json describes before anything is read; a missing,
extra or mis-shaped tensor is refused by name, all of them at once; nothing pickled is opened; a tensor, or the slice of
it that a rank owns, is read without the rest. Read next: `headers.py` (which file holds what), `writer.py`, `names.py`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megashear.config.shape import ModelShape
from megashear.errors import ModelError
from megashear.files import manifest as digests_of
from megashear.weights import names
from megashear.weights.headers import TensorEntry, read_headers
from megashear.weights.hf_config import NAME as CONFIG
from megashear.weights.hf_config import read_config, shape_of_config
from megashear.weights.identity import model_digest

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
        if digests or (path / digests_of.NAME).exists():
            manifest = digests_of.read_manifest(path, ModelError)
            digests_of.check_files(path, manifest, ModelError, digests=digests)
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
        expected = names.tensor_shapes(self.shape)
        if self.shape.tie_word_embeddings and names.OUTPUT in self.tensors and self._output_is_embedding():
            del self.tensors[names.OUTPUT]
        self.tensors = {name: entry for name, entry in self.tensors.items() if not names.is_harmless(name)}
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
        embedding, output = self.tensors.get(names.EMBEDDING), self.tensors[names.OUTPUT]
        if embedding is None or (embedding.shape, embedding.dtype) != (output.shape, output.dtype):
            return False
        rows = range(0, output.shape[0], 1024)
        ends = [(start, min(start + 1024, output.shape[0])) for start in rows]
        return all(
            torch.equal(self.read_slice(names.EMBEDDING, 0, *end), self.read_slice(names.OUTPUT, 0, *end))
            for end in ends
        )


def _extra_reason(name: str, shape: ModelShape) -> str:
    if name == names.OUTPUT and shape.tie_word_embeddings:
        return ": config.json ties the output layer to the embedding, but their values differ"
    return ""
