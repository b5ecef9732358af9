"""Declare a key of a run file as a dataclass field with its meaning and bounds in the metadata."""

from dataclasses import field
from typing import Any


def key(
    default: Any,
    meaning: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Declare a config key.

    Args:
        default: Default value; a list or dict is copied for each instance.
        meaning: Meaning in one sentence, without a final period.
        choices: Allowed words, also for the items of a list; empty allows any text.
        low, high: Inclusive bounds of a number.
    """
    metadata = {"help": meaning, "choices": choices, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
