"""Structure of the package: layers, circles, module names, and what torch-free packages import."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megashear"

# `files` precedes `config`, which reads and writes files; `plots` and `report` precede `phases`, which draw plots and
# print tables.
LAYERS = [
    "errors",
    "processes",
    "files",
    "config",
    "planning",
    "engine",
    "ops",
    "dataset",
    "preprocess",
    "mixture",
    "hf",
    "masks",
    "model",
    "importance",
    "checkpoint",
    "evaluation",
    "train",
    "plots",
    "report",
    "phases",
    "cli",
    "__main__",
]
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, also in functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return {module for module in found if module in MODULES and module != name}


def layer_of(name: str) -> str:
    """`megashear.config.load` -> `config`."""
    return name.split(".")[1]


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(name) for name in MODULES if "." in name} <= set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_layers_above_it(layer: str) -> None:
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    wrong = [
        f"{name} imports {module}"
        for name in MODULES
        if "." in name and layer_of(name) == layer
        for module in sorted(imports(name))
        if "." in module and layer_of(module) not in allowed
    ]
    assert wrong == []


def test_no_import_circle() -> None:
    # The root module imports its public functions on first use only.
    edges = {name: imports(name) for name in MODULES if name != "megashear"}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert edges == {}


def test_module_names_are_unique() -> None:
    names = Counter(path.stem for path in MODULES.values() if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
    vague = {"utils", "util", "common", "helpers", "misc", "parts", "blocks", "rules", "order", "report"}
    assert not vague & names.keys()


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize(
    "module",
    [
        "megashear.cli",
        "megashear.planning.plan_tables",
        "megashear.config.load",
        "megashear.planning.check",
        "megashear.files.lock",
    ],
)
def test_planning_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_engine_touches_megatron_core() -> None:
    wrong = [
        name
        for name, path in MODULES.items()
        if "parallel_state" in path.read_text(encoding="utf-8") and not name.startswith("megashear.engine")
    ]
    assert wrong == []
