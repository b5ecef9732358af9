"""Which file of a folder holds which tensor: headers of safetensors files, and the index over several of them.

Key properties: only headers are read, by the safetensors library, which checks them against the file's length; pickles
are never opened; a name in the index that leaves the folder is refused. Read next: `folder.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from megashear.errors import ModelError

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
                f"{path}: tensor {tensor} is said to stand in {file!r}, which is not the name of a safetensors file in"
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
