"""How a key of a run file is declared: `key`, a dataclass field with the key's meaning and bounds in its metadata.

Read next: `schema.py`.
"""

from dataclasses import field
from typing import Any


def key(
    default: Any,
    meaning: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A config key: default, meaning in one sentence, the words allowed (also as items of a list), inclusive bounds."""
    metadata = {"help": meaning, "choices": choices, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
