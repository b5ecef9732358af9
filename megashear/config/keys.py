"""The schema as a flat list: every leaf key with its dotted path, type, default, meaning, words and bounds.

What loading checks against, and what `docs/config.md` and the recipes are made from.
Read next: `schema.py`, `convert.py`.
"""

from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from megashear.config.schema import Config

Path = tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """One leaf key of a run file; `type` is the annotation, `choices` are words, `low` and `high` inclusive bounds."""

    path: Path
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None

    @property
    def name(self) -> str:
        """The dotted name, as in an override."""
        return ".".join(self.path)


@cache
def leaf_keys() -> dict[Path, Key]:
    """Every leaf key of a run file by path, in the schema's order."""
    return {key.path: key for key in _leaves(Config, Config(), ())}


@cache
def sections() -> dict[Path, str]:
    """Every section by path with its meaning, the root left out."""
    return dict(_sections(Config, ()))


def _leaves(cls: type, defaults: Any, prefix: Path) -> list[Key]:
    """`defaults` is an instance: a section may be given other defaults where it is used than where it is defined."""
    found: list[Key] = []
    hints = get_type_hints(cls)
    for item in fields(cls):
        path, kind, default = (*prefix, item.name), hints[item.name], getattr(defaults, item.name)
        if is_dataclass(kind):
            found += _leaves(kind, default, path)  # type: ignore[arg-type]  # get_type_hints gives classes
        else:
            meta = item.metadata
            found.append(Key(path, kind, default, meta["help"], meta["choices"], meta["low"], meta["high"]))
    return found


def _sections(cls: type, prefix: Path) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    hints = get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            assert item.default is not MISSING
            path = (*prefix, item.name)
            found += [(path, item.metadata["help"]), *_sections(hints[item.name], path)]
    return found
