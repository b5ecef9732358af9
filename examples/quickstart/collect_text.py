#!/usr/bin/env python
"""Collect text that this machine has anyway into shards of four domains: `python collect_text.py FOLDER [SHARE]`.

SHARE: of the text, to try things out (default: 1).

python: the standard library's sources. docs: the language reference that `help()` shows and the docstrings of numpy,
matplotlib and torch. packages: descriptions and licences of the installed packages. cpp: the headers that torch brings.
A document stands once, in one domain; files come in the order of their names' digests, so that the cap on a domain's
size cuts evenly. Read next: `train_tokenizer.py`.
"""

import argparse
import ast
import email
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megashear.errors import DataError, MegashearError
from megashear.files.atomic import atomic_folder

STANDARD = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
DOCUMENTED = ("numpy", "matplotlib", "torch")
NOT_TEXT = {"site-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data"}
CHARACTERS = {"python": 4_000_000, "docs": 4_000_000, "packages": 4_000_000, "cpp": 4_000_000}
"""Largest size of a domain."""
SHORTEST = 200
"""Characters below which a text is left out."""
LONGEST = 12_000
"""Characters at which a text is cut, so that no single file is a large share of a domain."""


def main() -> int:
    """Write FOLDER; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of shards to make")
    parser.add_argument("share", type=float, nargs="?", default=1.0, help="share of the text to take (default: 1)")
    options = parser.parse_args()
    domains = {"python": python(), "docs": docs(), "packages": packages(), "cpp": cpp()}
    seen: set[str] = set()
    try:
        with atomic_folder(options.folder) as temporary:
            for domain, texts in domains.items():
                most = int(options.share * CHARACTERS[domain])
                size = write_shard(temporary / f"{domain}_00000.jsonl", texts, most, seen)
                print(f"{domain:9} {size / 1e6:5.2f} million characters")
    except MegashearError as error:
        print(f"collect_text: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write_shard(path: Path, texts: Iterator[str], most: int, seen: set[str]) -> int:
    """Write texts that were not seen before, a JSON line each; returns their characters. Raises DataError for none."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            text = text.strip()[:LONGEST]
            key = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
            if len(text) < SHORTEST or key in seen:
                continue
            seen.add(key)
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size >= most:
                break
    if size == 0:
        raise DataError(f"{path.name}: this machine has no such text; name shards of your own instead")
    return size


def python() -> Iterator[str]:
    """Sources of the standard library, without its tests."""
    return contents(STANDARD, "*.py")


def docs() -> Iterator[str]:
    """Sections of the language reference, then docstrings."""
    from pydoc_data import topics

    yield from topics.topics.values()
    for name in DOCUMENTED:
        for source in contents(PACKAGES / name, "*.py"):
            yield from docstrings(source)


def packages() -> Iterator[str]:
    """Descriptions of packages as on their index, and their licences."""
    for folder in sorted(PACKAGES.glob("*.dist-info")):
        for text in contents(folder, "METADATA"):
            yield str(email.message_from_string(text).get_payload())
        for pattern in ("*LICEN[CS]E*", "*COPYING*", "*NOTICE*"):
            yield from contents(folder, pattern)


def cpp() -> Iterator[str]:
    """Headers of torch."""
    return contents(PACKAGES / "torch" / "include", "*.h")


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions, one text each."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # some packages ship templates
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def contents(folder: Path, pattern: str) -> Iterator[str]:
    """Texts of the files below a folder, in the order of their paths' digests."""
    paths = [path for path in folder.rglob(pattern) if not NOT_TEXT & set(path.relative_to(folder).parts)]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
