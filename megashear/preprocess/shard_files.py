"""Find shards (files, folders, globs, lists), split large ones into pieces; records of a shard.

Each file is used once, whatever it is called on the command line. Shards are sorted, so the order of arguments has no
effect.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.errors import DataError

PARQUET = ".parquet"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", PARQUET)
LONGEST_LINE = 1 << 28
LARGEST_PIECE = 1 << 29  # bytes that one process reads of a file at most, where the form allows
EXCERPT = 200


@dataclass(frozen=True)
class ShardPiece:
    """Piece `number` (from 0) of `count` of a shard: the lines that begin in its share of the bytes, or row groups."""

    path: Path
    number: int = 0
    count: int = 1

    def share(self, total: int) -> tuple[int, int]:
        """Its range of `total` things."""
        return total * self.number // self.count, total * (self.number + 1) // self.count


def pieces_of(path: Path) -> list[ShardPiece]:
    """A shard as one piece, or as several where it is large and of a form that can be entered in the middle."""
    size = path.stat().st_size if path.name.endswith((".jsonl", PARQUET)) else 0
    count = max(1, -(-size // LARGEST_PIECE))
    return [ShardPiece(path, number, count) for number in range(count)]


@dataclass(frozen=True)
class Document:
    """A good line (a row of parquet): its number from 1, its text, the whole object (parquet: columns asked for)."""

    line: int
    text: str
    record: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that gives no document: its number from 1, why, and its first characters."""

    line: int
    reason: str
    excerpt: str


LIST = "@"  # `@FILE` names a file with one input a line


def find_shards(inputs: Sequence[str]) -> list[Path]:
    """Shards of files, folders (searched to the bottom), globs and `@lists`, each once, sorted; raises DataError."""
    found: dict[Path, Path] = {}
    for given in inputs:
        for path in expand(given):
            if not path.name.endswith(SUFFIXES):
                raise DataError(f"{path}: not a shard that can be read; its name must end in {', '.join(SUFFIXES)}")
            real = path.resolve()
            found[real] = min(path, found.get(real, path), key=lambda p: (len(p.parts), p))
    return sorted(found.values())


def expand(given: str) -> list[Path]:
    """The files of one input; raises DataError where there is none."""
    path = Path(given)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
    elif path.is_file():
        files = [path]
    elif given.startswith(LIST):
        return [p for line in read_list(Path(given[len(LIST) :])) for p in expand(line)]
    else:
        files = [p for name in glob.glob(given, recursive=True) if (p := Path(name)).is_file()]
    if not files:
        raise DataError(f"{given}: no shard there; give files, folders, globs or @lists of {', '.join(SUFFIXES)}")
    return files


def read_list(path: Path) -> list[str]:
    """The lines of a list file, blank ones left out; raises DataError. Lists do not name lists."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the list of inputs cannot be read ({error}); check the path") from error
    wrong = next((line for line in lines if line.startswith(LIST)), None)
    if wrong is not None:
        raise DataError(f"{path}: {wrong}: a list cannot name another list; name the files")
    return [line for line in lines if line]
