"""A progress line on standard error: share done, rate, time left.

On a terminal the line is rewritten once a second; elsewhere a new one is printed every ten seconds. Read next:
`preprocess.py`.
"""

import sys
import time
from typing import TextIO


class Progress:
    """Reports how far `total` units have come."""

    def __init__(self, what: str, total: int, output: TextIO | None = None) -> None:
        """what: name of the step; total: units in all (bytes, tokens)."""
        self.what, self.total = what, max(total, 1)
        self.output = sys.stderr if output is None else output
        self.terminal = self.output.isatty()
        self.start = self.last = time.monotonic()
        self._written = False

    def update(self, done: int, tokens: int) -> None:
        """Report, unless the last report is recent. done: units; tokens: tokens, for the rate."""
        if time.monotonic() - self.last >= (1.0 if self.terminal else 10.0):
            self._write(done, tokens)

    def finish(self, tokens: int) -> None:
        """Report the end."""
        self._write(self.total, tokens)
        if self.terminal:
            self.output.write("\n")

    def _write(self, done: int, tokens: int) -> None:
        self.last = time.monotonic()
        seconds = max(self.last - self.start, 1e-9)
        share = min(done / self.total, 1.0)
        left = seconds * (1 - share) / share if share > 0 else float("inf")
        eta = "?" if left == float("inf") else f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        line = f"{self.what}: {share:6.1%}  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s  left {eta}"
        self.output.write(f"\r{line}\x1b[K" if self.terminal else line + "\n")
        self.output.flush()
