"""Manifest of a folder: size and SHA-256 of every file.

A folder that differs from its `manifest.json` is refused with the name of the file. Names that leave the folder are
refused.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from megashear.errors import MegashearError
from megashear.files.atomic import write_json

NAME = "manifest.json"


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str, error: type[MegashearError]) -> Path:
    """The path of `name` in `folder`; raises `error` for a name that is absolute or leaves the folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise error(
            f"{folder / NAME}: the name {name!r} leaves the folder; megashear did not make this manifest, do not use it"
        )
    return folder.joinpath(*parts)


def write_manifest(folder: Path, extra: dict[str, Any]) -> None:
    """Write the digests of every file below `folder`, with `extra` keys beside them. Raises StorageError."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in names}
    write_json(folder / NAME, {**extra, "files": files})


def read_manifest(folder: Path, error: type[MegashearError]) -> dict[str, Any]:
    """The manifest of a folder, not yet compared with its files; raises `error` where it is missing or unreadable."""
    path = Path(folder) / NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError as missing:
        raise error(f"{path}: not found; the folder is not whole, make it again") from missing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as damaged:
        raise error(f"{path}: damaged or not a manifest ({damaged}); make the folder again") from damaged
    for name in sizes:
        inside(Path(folder), name, error)
    return content


def check_files(folder: Path, manifest: dict[str, Any], error: type[MegashearError], digests: bool = True) -> None:
    """Compare sizes, and digests unless told not to, of every file the manifest names; raises `error` by file name."""
    for name, entry in manifest["files"].items():
        path = inside(Path(folder), name, error)
        if not path.is_file():
            raise error(f"{path}: missing; the manifest beside it names it, restore it or make the folder again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise error(f"{path}: {size} bytes, the manifest says {entry['bytes']}; the file is truncated or changed")
        if digests and digest(path) != entry["sha256"]:
            raise error(f"{path}: its SHA-256 is not the manifest's; the file is damaged or changed")
