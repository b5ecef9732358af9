"""What a run would stand on here: versions, devices, and which library serves each role; `megashear env` prints it.

Key property: it reports what the code itself would choose, from the modules that were really loaded. NVIDIA's Apex is
told by its compiled modules, since the distribution named `apex` on PyPI is another project.
"""

import contextlib
import importlib.util
import os
import platform
from types import ModuleType

import torch
from megatron.core.optimizer import Adam

import megashear
from megashear.engine.device import backend, uses_cuda
from megashear.engine.parallel import gradient_fusion_available

APEX_MODULES = ("apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")
LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy")
SERVED_BY = {
    "transformer_engine": "Transformer Engine",
    "transformer_engine_torch": "Transformer Engine",
    "apex": "Apex",
    "amp_C": "Apex",
    "torch": "torch",
    "megatron": "megatron-core",
}
"""Library by the first name of a module, compiled ones too."""


def describe() -> list[tuple[str, str]]:
    """Pairs of (name, value) in the order in which they are shown; what is missing is said, never raised."""
    return [*versions(), *devices(), *roles()]


def versions() -> list[tuple[str, str]]:
    """This package, Python and every library that takes part, optional ones too."""
    rows = [("megashear", megashear.__version__), ("Python", platform.python_version())]
    for name in LIBRARIES:
        try:
            # torch's metadata may leave out what it was built for, such as +cu130.
            rows.append((name, torch.__version__ if name == "torch" else importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    engine = importable("transformer_engine")
    told = "not installed" if engine is None else str(getattr(engine, "__version__", "present"))
    rows.append(("Transformer Engine", told))
    found = [name for name in APEX_MODULES if importable(name) is not None]
    rows.append(("NVIDIA Apex", ", ".join(found) or "not installed"))
    return rows


def devices() -> list[tuple[str, str]]:
    """The devices in use and how ranks talk to each other."""
    if uses_cuda():
        rows = [
            (f"device {index}", f"{item.name}, {item.total_memory / 2**30:.0f} GiB, compute {item.major}.{item.minor}")
            for index, item in ((i, torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
        ]
    else:
        why = "MEGASHEAR_DEVICE=cpu" if torch.cuda.is_available() else "no GPU found"
        rows = [("device", f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads ({why})")]
    return [*rows, ("backend of torch.distributed", backend())]


def roles() -> list[tuple[str, str]]:
    """What serves each role; the ops are listed by `ops.backend`, in a room below this one."""
    fusion = uses_cuda() and gradient_fusion_available()
    return [
        ("parallel linears", "megatron-core"),
        ("Adam", served_by(Adam.__module__)),
        ("clipping", "torch"),
        ("gradient accumulation fusion", "Apex" if fusion else "none"),
    ]


def served_by(module: str) -> str:
    """The library of a module, by its first name."""
    first = module.split(".")[0]
    return SERVED_BY.get(first, first)


def importable(name: str) -> ModuleType | None:
    """The module, or null where it is missing or cannot be loaded (a build for another CUDA, for instance)."""
    with contextlib.suppress(Exception):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    return None
