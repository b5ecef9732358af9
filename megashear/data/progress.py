"""A progress line on standard error: share done, shards, rates, time left.

On a terminal the line is rewritten once a second; elsewhere a new one is printed every ten seconds. Read next:
`preprocess.py`.
"""

import sys
import time
from typing import TextIO


class Progress:
    """Reports how far `total` units have come."""

    def __init__(self, what: str, total: int, shards: int = 0, output: TextIO | None = None) -> None:
        """what: name of the step; total: units in all (bytes where there are shards to count, else tokens)."""
        self.what, self.total, self.shards = what, max(total, 1), shards
        self.output = sys.stderr if output is None else output
        self.terminal = self.output.isatty()
        self.start = self.last = time.monotonic()

    def update(self, done: int, tokens: int, shards: int = 0) -> None:
        """Report, unless the last report is recent. done: units; tokens: tokens, for the rate; shards: finished."""
        if time.monotonic() - self.last >= (1.0 if self.terminal else 10.0):
            self._write(done, tokens, shards)

    def finish(self, tokens: int) -> None:
        """Report the end."""
        self._write(self.total, tokens, self.shards)
        if self.terminal:
            self.output.write("\n")

    def _write(self, done: int, tokens: int, shards: int) -> None:
        self.last = time.monotonic()
        seconds = max(self.last - self.start, 1e-9)
        share = min(done / self.total, 1.0)
        left = seconds * (1 - share) / share if share > 0 else float("inf")
        eta = "?" if left == float("inf") else f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        parts = [f"{self.what}: {share:6.1%}"]
        if self.shards:
            parts += [f"{shards} of {self.shards} shards", f"{done / seconds / 1e6:,.1f} MB/s"]
        line = "  ".join([*parts, f"{tokens:,} tokens", f"{tokens / seconds:,.0f} tokens/s", f"left {eta}"])
        self.output.write(f"\r{line}\x1b[K" if self.terminal else line + "\n")
        self.output.flush()
