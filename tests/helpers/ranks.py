"""Real ranks under torchrun, started once per world size and given many calls: starting them costs seconds.

`Ranks(4).call("parallel.step_case:pruning_step", shape=..., ...)` runs that function on four ranks and returns what
it returned on rank 0. If a rank fails, all of them end and the call raises with their output. See `serve.py`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import psutil

TESTS = Path(__file__).resolve().parents[1]
RANK_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "MEGASHEAR_DEVICE": "cpu",
}


class RanksFailed(Exception):
    """A rank raised, died, or did not answer in time; the message holds the end of the ranks' output."""


class Ranks:
    """A torchrun job of `world` ranks that waits for calls; `start` starts it, as does the first call."""

    def __init__(self, world: int) -> None:
        self.world, self.calls = world, 0
        self.process: subprocess.Popen[str] | None = None
        self.place = tempfile.TemporaryDirectory(prefix=f"ranks{world}-")
        self.output = Path(self.place.name) / "output.txt"

    def start(self) -> None:
        """Start the ranks if they do not run, and wait until they listen. Raises RanksFailed."""
        if self.process is None:
            self.process = self._launch()
            self._answer("ping", {}, timeout=150.0)

    def call(self, function: str, timeout: float = 150.0, **arguments: Any) -> Any:
        """Call `module:function` on every rank.

        Args:
            function: Name as `package.module:function`, importable from `tests/`.
            timeout: Seconds until the answer must be there.
            arguments: Keyword arguments, as JSON holds them.

        Returns:
            What the function returned on rank 0: numbers, strings, tensors, dicts and lists of them.

        Raises:
            RanksFailed: A rank raised, died or gave no answer in time.
        """
        self.start()
        return self._answer(function, arguments, timeout)

    def cpu_seconds(self) -> float:
        """CPU time of the job so far: torchrun, its ranks and their child processes."""
        total = 0.0
        if self.process is not None:
            with contextlib.suppress(psutil.Error):
                launcher = psutil.Process(self.process.pid)
                for process in [launcher, *launcher.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        times = process.cpu_times()
                        total += times.user + times.system + times.children_user + times.children_system
        return total

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
            os.killpg(self.process.pid, signal.SIGTERM)  # torchrun passes it to its ranks
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._kill()
        self.process = None

    def _kill(self) -> None:
        """Kill torchrun and its ranks, each of which has a session of its own."""
        assert self.process is not None
        launcher = psutil.Process(self.process.pid)
        for process in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def _answer(self, function: str, arguments: dict[str, Any], timeout: float) -> Any:
        import torch

        assert self.process is not None and self.process.stdin is not None
        self.calls += 1
        answer = Path(self.place.name) / f"{self.calls}.pt"
        call = {"function": function, "arguments": arguments, "answer": str(answer)}
        deadline = time.monotonic() + timeout
        try:
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            while not answer.exists():
                if self.process.poll() is not None:
                    raise RanksFailed(f"{self.world} ranks ended: {self._tail()}")
                if time.monotonic() > deadline:
                    raise RanksFailed(f"{self.world} ranks gave no answer in {timeout:.0f} s: {self._tail()}")
                time.sleep(0.01)
        except (RanksFailed, BrokenPipeError):
            self.stop(now=True)
            raise
        found = torch.load(answer, weights_only=True)
        answer.unlink()
        return found

    def _launch(self) -> "subprocess.Popen[str]":
        # --standalone lets torchrun choose a free port; --tee names the rank in front of each line. torchrun looks at
        # its ranks once a second, not ten times: it waits beside tests that need the cores.
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.world), "--tee", "3"]
        command += ["--monitor-interval", "1", "--log-dir", self.place.name, "-m", "helpers.serve"]
        with self.output.open("w") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | RANK_ENVIRONMENT,
                text=True,
                start_new_session=True,
            )

    def _tail(self) -> str:
        return "\n" + self.output.read_text(errors="replace")[-6000:]


LiveRanks: TypeAlias = Callable[[int], Ranks]
"""The fixture `ranks`: maps a world size to its live ranks."""


def torchrun_command(ranks: int, *arguments: Any) -> dict[str, Any]:
    """Arguments of `subprocess.run` or `Popen` for `torchrun -m ARGUMENTS` on this machine's CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return {"args": [*command, *map(str, arguments)], "env": os.environ | RANK_ENVIRONMENT, "text": True}


def torchrun(ranks: int, *arguments: Any, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `torchrun -m ARGUMENTS` to its end; the caller checks its output. For tests of the process itself."""
    return subprocess.run(**torchrun_command(ranks, *arguments), capture_output=True, timeout=timeout, check=False)
