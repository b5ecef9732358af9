"""The schema as a flat list: every leaf key with its dotted path, type, default, meaning, words and bounds.

What loading checks against, and what `docs/config.md` and the recipes are made from.
Read next: `schema.py`, `convert.py`.

A plain value (of YAML, an override or an environment variable) as the type of its key, or the reason why not.

Text stands for a number or a truth value where it reads as one, because environment variables are text; nothing else is
guessed. Read next: `keys.py`, `load.py`.
"""

import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

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


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word nearest to `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def convert(value: Any, key: Key) -> Any:
    """The value as the key's type, within its words and bounds. Raises ValueError with what was expected."""
    if value == "???":
        raise ValueError("is left as ???; give it a value")
    result = _typed(value, key.type)
    for item in result if isinstance(result, list) else [result]:
        if key.choices and item is not None and item not in key.choices:
            words = ", ".join(key.choices)
            raise ValueError(f"is {item!r}, expected one of {words}{near(str(item), key.choices)}")
        _in_bounds(item, key)
    return result


def _in_bounds(value: Any, key: Key) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if key.low is not None and value < key.low:
        raise ValueError(f"is {value}, expected at least {key.low}")
    if key.high is not None and value > key.high:
        raise ValueError(f"is {value}, expected at most {key.high}")


def _typed(value: Any, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        inner = next(item for item in arguments if item is not type(None))
        return None if value is None else _typed(value, inner)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"is {_shown(value)}, expected a list such as [a, b]")
        return [_typed(item, arguments[0]) for item in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"is {_shown(value)}, expected a mapping such as {{cc: 0.7, github: 0.3}}")
        return {_text(name): _typed(item, arguments[1]) for name, item in value.items()}
    return {str: _text, int: _whole, float: _number, bool: _truth}[kind](value)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value) if not isinstance(value, dict) else "a mapping"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    hint = "; put it in quotes" if isinstance(value, (int, float)) else ""
    raise ValueError(f"is {_shown(value)}, expected text{hint}")


def _number(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"is {_shown(value)}, expected a finite number")


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    raise ValueError(f"is {_shown(value)}, expected a whole number")


def _truth(value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"is {_shown(value)}, expected true or false")
