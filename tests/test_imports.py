"""Rooms import only rooms above them, and the rooms above the engine know no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megashear"

# config reads and writes files, and files know nothing of config: so files stand above it.
ROOMS = [
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


def room_of(name: str) -> str:
    """`megashear.config.load` -> `config`."""
    return name.split(".")[1]


def imports(path: Path) -> set[str]:
    """Full names of the package's modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("megashear.") and not name.endswith("__version__")}


def test_every_module_stands_in_a_known_room() -> None:
    there = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert there - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    folder = PACKAGE / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        if path.exists()
        for name in sorted(imports(path))
        if room_of(name) not in allowed
    ]
    assert wrong == []


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
def test_the_rooms_of_a_laptop_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_engine_touches_megatron_core() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "parallel_state" in text and path.relative_to(PACKAGE).parts[0] != "engine":
            wrong.append(str(path.relative_to(PACKAGE)))
    assert wrong == []
