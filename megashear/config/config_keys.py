"""List the leaf keys of the schema, and convert plain values to a key's type.

Loading, `docs/config.md` and the recipes use this list. Values from YAML, overrides or the environment may be text:
text is accepted for a number or a truth value if it spells one.
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
    """One leaf key of a run file.

    Attributes:
        path: Names of the enclosing sections and of the key.
        type: Type annotation of the dataclass field.
        default: Default value at this place in the schema.
        help: Meaning in one sentence.
        choices: Allowed words; empty allows any text.
        low, high: Inclusive bounds of a number.
    """

    path: Path
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None

    @property
    def name(self) -> str:
        """Dotted name, as in an override."""
        return ".".join(self.path)

    @property
    def is_auto(self) -> bool:
        """Whether an unset value is derived: written as `auto` in run files, None in the config."""
        return "auto: " in self.help


@cache
def leaf_keys() -> dict[Path, Key]:
    """Return every leaf key by path, in the schema's order."""
    return {key.path: key for key in _leaves(Config, Config(), ())}


@cache
def sections() -> dict[Path, str]:
    """Return the meaning of every section by path, without the root."""
    return dict(_sections(Config, ()))


def _leaves(cls: type, defaults: Any, prefix: Path) -> list[Key]:
    """List the leaf keys of `cls`; `defaults` is an instance, since a section's defaults may differ per use."""
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
    """Return `; did you mean X?` for the known word nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def convert(value: Any, key: Key) -> Any:
    """Convert a value to the key's type and check its choices and bounds.

    Raises:
        ValueError: If the value is not allowed; the message names the expected values.
    """
    if value == "???":
        raise ValueError("is ???, a placeholder; set a value")
    if key.is_auto and value == "auto":
        return None
    result = _typed(value, key.type)
    for item in result if isinstance(result, list) else [result]:
        if key.choices and item is not None and item not in key.choices:
            words = ", ".join(key.choices)
            raise ValueError(f"is {item!r}, expected one of {words}{near(str(item), key.choices)}")
        _in_bounds(item, key)
    return result


def written(value: Any, key: Key) -> Any:
    """Return a value as run files write it: `auto` for the None of a derived key."""
    return "auto" if value is None and key.is_auto else value


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
