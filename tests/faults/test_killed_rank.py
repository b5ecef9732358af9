"""A rank that is killed: the job ends at once, no process stays, one message says what happened; the run goes on."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from faults.test_signals import wait_for
from helpers.budget import slow
from helpers.processes import live_processes, processes_of
from helpers.ranks import torchrun_command
from helpers.tiny import Tiny, finish
from phases.test_layouts import losses


def children(process: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.medium
@pytest.mark.expensive("a job of torchrun, its two ranks and their helpers")
@pytest.mark.parametrize("victim", [0, *slow(1)])
def test_a_rank_that_is_killed(tiny: Tiny, tmp_path: Path, unbroken_folder: Path, victim: int) -> None:
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    call = torchrun_command(2, "megashear", "run", tiny.file(folder, checkpoint={"interval": 1}))
    with output.open("w") as stream:
        process = subprocess.Popen(**call, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for((folder / "prune/step-00000002").exists, process)  # helpers of the checkpoint run by now
    ranks = children(process.pid)
    assert len(live_processes(ranks[victim])) > 1, "torchrun gives each rank a session; its helpers are in it"
    os.kill(ranks[victim], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert [processes_of(session, seconds=20) for session in (process.pid, *ranks)] == [[], [], []]
    said = output.read_text()
    assert "internal error" not in said and "another rank failed" in said, said
    finish(tiny.config(folder))
    np.testing.assert_allclose(losses(folder), losses(unbroken_folder), rtol=2e-5)  # on one rank now: to rounding
