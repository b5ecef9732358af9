"""A rank that is killed: the job ends at once, no process stays, one message says what happened; the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_stages.test_layouts import losses
from run_stages.tiny import Tiny, finish

from faults.test_signals import TESTS, wait_for


def start_ranks(file: Path, output: Path) -> "subprocess.Popen[str]":
    """Two data-parallel ranks under torchrun, in a session of their own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megashear", "run"]
    with output.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, *command, str(file)],
            env=environment | {"MEGASHEAR_DEVICE": "cpu"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def children(process: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def in_session(session: int) -> dict[int, str]:
    """The live processes of a session, and their commands: what is left behind keeps its session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed(tiny: Tiny, tmp_path: Path, unbroken_folder: Path, victim: int) -> None:
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    process = start_ranks(tiny.file(folder, checkpoint={"interval": 1}), output)
    wait_for((folder / "prune/step-00000002").exists, process)  # helpers of the checkpoint run by now
    ranks = children(process.pid)
    assert len(in_session(ranks[victim])) > 1, "torchrun gives each rank a session; its helpers are in it"
    os.kill(ranks[victim], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    deadline = time.monotonic() + 20
    while left := in_session(process.pid) | in_session(ranks[0]) | in_session(ranks[1]):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    said = output.read_text()
    assert "fault of megashear" not in said and "another rank has ended" in said, said
    finish(tiny.config(folder))
    np.testing.assert_allclose(losses(folder), losses(unbroken_folder), rtol=2e-5)  # on one rank now: to rounding
