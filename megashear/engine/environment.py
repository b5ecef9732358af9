"""Report versions, devices and the backend of each op (`megashear env`).

The report shows the libraries that the code selects, taken from the modules that are loaded. NVIDIA Apex is detected by
its compiled modules, because the distribution named `apex` on PyPI is another project.
"""

import contextlib
import importlib.util
import os
import platform
from types import ModuleType

import torch
from megatron.core.optimizer import Adam

import megashear
from megashear.engine.device import backend
from megashear.engine.parallel import gradient_fusion_available
from megashear.engine.startup import uses_cuda

APEX_MODULES = ("apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")
LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy")
LIBRARY_OF_MODULE = {
    "transformer_engine": "Transformer Engine",
    "transformer_engine_torch": "Transformer Engine",
    "apex": "Apex",
    "amp_C": "Apex",
    "torch": "torch",
    "megatron": "megatron-core",
}
"""Library by top-level module name, including compiled modules."""


def describe() -> list[tuple[str, str]]:
    """Return (name, value) pairs in display order. Missing libraries are reported, never raised."""
    return [*versions(), *devices(), *roles()]


def versions() -> list[tuple[str, str]]:
    """Return the versions of megashear, Python and all libraries, including optional ones."""
    rows = [("megashear", megashear.__version__), ("Python", platform.python_version())]
    for name in LIBRARIES:
        try:
            # torch's metadata may lack the build suffix, such as +cu130.
            rows.append((name, torch.__version__ if name == "torch" else importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    engine = importable("transformer_engine")
    version = "not installed" if engine is None else str(getattr(engine, "__version__", "present"))
    rows.append(("Transformer Engine", version))
    found = [name for name in APEX_MODULES if importable(name) is not None]
    rows.append(("NVIDIA Apex", ", ".join(found) or "not installed"))
    return rows


def devices() -> list[tuple[str, str]]:
    """Return the devices in use and the communication backend."""
    if uses_cuda():
        rows = [
            (f"device {index}", f"{item.name}, {item.total_memory / 2**30:.0f} GiB, compute {item.major}.{item.minor}")
            for index, item in ((i, torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
        ]
    else:
        reason = "MEGASHEAR_DEVICE=cpu" if torch.cuda.is_available() else "no GPU found"
        rows = [("device", f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads ({reason})")]
    return [*rows, ("backend of torch.distributed", backend())]


def roles() -> list[tuple[str, str]]:
    """Return the library of each role. The backends of the ops come from `ops.backend`."""
    fusion = uses_cuda() and gradient_fusion_available()
    return [
        ("parallel linears", "megatron-core"),
        ("Adam", library_of(Adam.__module__)),
        ("clipping", "torch"),
        ("gradient accumulation fusion", "Apex" if fusion else "none"),
    ]


def library_of(module: str) -> str:
    """Return the library of a module, by its top-level name."""
    top_level = module.split(".")[0]
    return LIBRARY_OF_MODULE.get(top_level, top_level)


def importable(name: str) -> ModuleType | None:
    """Return the module, or None if it is missing or cannot be loaded (a build for another CUDA, for instance)."""
    with contextlib.suppress(Exception):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    return None
