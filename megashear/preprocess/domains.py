"""Assign documents to domains: by a fixed name, a field of the line, or the name of the shard.

In this order: the name given for all; the value of a key such as `meta.redpajama_set_name` (`meta` may be an object or
a string of JSON, as in RedPajama); the shard's name before `_00000`; the name of its folder. A map renames values.
"""

import fnmatch
import json
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import orjson

from megashear.dataset.dataset_folder import check_domain_name
from megashear.errors import DataError
from megashear.preprocess.shard_files import SUFFIXES

DEFAULT_KEY = "meta.redpajama_set_name"


class NoDomain(ValueError):
    """A line's domain cannot be used; the message says why (the line is then a bad line)."""


@dataclass(frozen=True)
class DomainRule:
    """How domains are found. `fixed`: one name for all; `key`: dotted path; `patterns`: (name, pattern) in order."""

    fixed: str | None = None
    key: str = DEFAULT_KEY
    patterns: tuple[tuple[str, str], ...] = ()

    def of(self, record: dict[str, Any], shard: Path) -> str:
        """The domain of one line of a shard; raises NoDomain."""
        if self.fixed is not None:
            return self.fixed
        value = lookup(record, self.key)
        if value is not None and not isinstance(value, str):
            raise NoDomain(f"{self.key} is not a string")
        raw = (value,) if value is not None else (stem(shard), shard_domain(shard))
        name, problem = renamed(raw, self.patterns)
        if problem is not None:
            raise NoDomain(f"the domain name {name!r} {problem}")
        return name


@lru_cache(maxsize=1 << 12)
def renamed(raw: tuple[str, ...], patterns: tuple[tuple[str, str], ...]) -> tuple[str, str | None]:
    """The name for which the first pattern fits one of `raw`, else the last of these; and why it cannot be one."""
    name = next((to for given in raw for to, pattern in patterns if fnmatch.fnmatchcase(given, pattern)), raw[-1])
    return name, check_domain_name(name)


def lookup(record: Any, key: str) -> Any:
    """The value at a dotted path, parsing strings of JSON on the way; None where there is none."""
    for part in key.split("."):
        if isinstance(record, str):
            try:
                record = orjson.loads(record)
            except orjson.JSONDecodeError:
                return None
        if not isinstance(record, dict):
            return None
        record = record.get(part)
    return record


@cache
def stem(shard: Path) -> str:
    """A shard's name without its suffix."""
    suffix = max((s for s in SUFFIXES if shard.name.endswith(s)), key=len, default="")
    return shard.name.removesuffix(suffix)


@cache
def shard_domain(shard: Path) -> str:
    """The name before `_00000`, else the folder's name."""
    numbered = re.fullmatch(r"(.+)_\d+", stem(shard))
    return numbered.group(1) if numbered else Path(shard).absolute().parent.name


def parse_domain_map(values: list[str]) -> tuple[tuple[str, str], ...]:
    """(name, pattern) pairs of `name=pattern` arguments and of JSON files `{name: pattern or [patterns]}`; raises
    DataError.

    Patterns are shell patterns (`*`, `?`, `[...]`), case counts.
    """
    pairs: list[tuple[str, str]] = []
    for value in values:
        name, equals, pattern = value.partition("=")
        pairs += [(name, pattern)] if equals else read_domain_map(Path(value))
    for name, _ in pairs:
        if (problem := check_domain_name(name)) is not None:
            raise DataError(f"--domain-map: the domain name {name!r} {problem}; give another name")
    return tuple(pairs)


def read_domain_map(path: Path) -> list[tuple[str, str]]:
    """(name, pattern) pairs of a JSON file; raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: [given] if isinstance(given, str) else list(given) for name, given in content.items()}
        if not all(isinstance(pattern, str) for patterns in lists.values() for pattern in patterns):
            raise ValueError("patterns must be strings")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"--domain-map {path}: neither name=pattern nor a JSON file {{name: pattern or [patterns]}} ({error})"
        ) from error
    return [(name, pattern) for name, patterns in lists.items() for pattern in patterns]
