"""The run lock between real processes: one holder at a time, named to the other, gone with the holder's death."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megashear.errors import BusyError, StorageError
from megashear.files.lock import run_lock

HOLDER = """
import sys, time
from pathlib import Path
from megashear.files.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        expected = rf"run: in use by process {process.pid} on {socket.gethostname()}; wait for it"
        with pytest.raises(BusyError, match=expected), run_lock(tmp_path / "run"):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with run_lock(tmp_path / "run"):
            assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()


def test_a_lock_is_free_again_after_use_and_after_errors(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path), pytest.raises(BusyError, match=f"process {os.getpid()}"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), run_lock(tmp_path / "file" / "run"):
        pass
