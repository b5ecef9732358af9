"""megatron-core is imported in the engine and nowhere else in the package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megashear"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_only_the_engine_imports_megatron() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if "megatron" in imported(path)}
    assert rooms == {"engine"}
