"""The command line within this process."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers.tiny import without_pictures
from megashear import cli

Refuse = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """`refused(code, words, *arguments)`: the command ends with that code; its errors hold the words.

    Each problem is told once, in a line of its own, and no traceback.
    """

    def run(code: int, words: list[str], *arguments: Any) -> str:
        capsys.readouterr()
        with without_pictures():
            assert cli.main([str(one) for one in arguments]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megashear: error: ")]
        assert lines and len(lines) == len(set(lines)), lines
        assert all(any(word in line for line in lines) for word in words), lines
        assert code != 70
        return "\n".join(lines)

    return run
