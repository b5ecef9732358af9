"""Which shards a command line names: files, folders, globs and lists of them.

Key properties: each file once, however often and by whatever spelling it is named (the shortest counts); sorted, so
that the order of naming changes nothing. Read next: `shards.py`.
"""

import glob
from collections.abc import Sequence
from pathlib import Path

from megashear.data.shards import SUFFIXES
from megashear.errors import DataError

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
