"""Real ranks under torchrun, started once per world size and given many cases: starting gloo costs seconds.

`Ranks(4).call("parallel.step_case", "pruning_step", tensor=2, ...)` runs that function on four ranks and gives what
it returned on rank 0. A rank that fails ends all of them; the call raises with what the ranks wrote. Read next:
`serve.py`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]


class RanksFailed(Exception):
    """A rank raised, died, or did not answer in time; the message holds the end of what the ranks wrote."""


class Ranks:
    """A torchrun job of `world` ranks that waits for calls; started at the first one."""

    def __init__(self, world: int) -> None:
        self.world, self.calls = world, 0
        self.process: subprocess.Popen[str] | None = None
        self.place = tempfile.TemporaryDirectory(prefix=f"ranks{world}-")
        self.output = Path(self.place.name) / "output.txt"

    def call(self, module: str, function: str, timeout: float = 150.0, **arguments: Any) -> Any:
        """What `module.function(**arguments)` returned on rank 0: numbers, strings, tensors, dicts and lists of them.

        timeout: in seconds. Raises RanksFailed.
        """
        if self.process is None:
            self.process = self._start()
        self.calls += 1
        answer = Path(self.place.name) / f"{self.calls}.pt"
        job = {"module": module, "function": function, "arguments": arguments, "answer": str(answer)}
        deadline = time.monotonic() + timeout
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            while not answer.exists():
                if self.process.poll() is not None:
                    raise RanksFailed(f"{self.world} ranks ended: {self._said()}")
                if time.monotonic() > deadline:
                    raise RanksFailed(f"{self.world} ranks gave no answer in {timeout:.0f} s: {self._said()}")
                time.sleep(0.02)
        except (RanksFailed, BrokenPipeError):
            self.stop(now=True)
            raise
        return torch.load(answer, weights_only=True)

    def end_input(self) -> None:
        """Let the ranks end, without waiting for it."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def stop(self, now: bool = False) -> None:
        """Let the ranks end (at the end of their input), or kill the whole job now; the next call starts afresh."""
        if self.process is None:
            return
        if not now:
            self.end_input()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                now = True
        if now and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # torchrun hands it on to its ranks
            self.process.wait(timeout=60)
        self.process = None

    def _start(self) -> "subprocess.Popen[str]":
        # --standalone lets torchrun choose a free port; --tee names the rank in front of each line. torchrun looks at
        # its ranks once a second, not ten times: it waits beside tests that need the cores.
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.world), "--tee", "3"]
        command += ["--monitor-interval", "1", "--log-dir", self.place.name, "-m", "parallel.serve"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "MEGASHEAR_DEVICE": "cpu",
        }
        with self.output.open("w") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
                start_new_session=True,
            )

    def _said(self) -> str:
        return "\n" + self.output.read_text(errors="replace")[-6000:]
