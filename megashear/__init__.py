"""Targeted structured pruning of LLaMA models, and continued pre-training on a dynamic mixture.

The functions below are what the command line calls. They are imported on first use, so that `import megashear` loads
neither torch nor numpy.

Example:
    >>> import megashear
    >>> config = megashear.load_config("my.yaml", ["run.seed=2"])
    >>> megashear.run(config)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megashear.config.load import load_config
    from megashear.dataset.dataset_folder import Dataset
    from megashear.evaluation.evaluate_model import evaluate
    from megashear.hf.export_model import export_model
    from megashear.hf.import_model import import_model
    from megashear.phases.runner import run

__version__ = "0.1.0"
__all__ = ["Dataset", "evaluate", "export_model", "import_model", "load_config", "run"]

_MODULES = {
    "Dataset": "megashear.dataset.dataset_folder",
    "evaluate": "megashear.evaluation.evaluate_model",
    "export_model": "megashear.hf.export_model",
    "import_model": "megashear.hf.import_model",
    "load_config": "megashear.config.load",
    "run": "megashear.phases.runner",
}


def __getattr__(name: str) -> Any:
    """Import a public function on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'megashear' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
