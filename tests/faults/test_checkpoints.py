"""Checkpoints that are damaged, hostile, cut off by a full disk or by a kill: the newest whole one serves, and it is
said.
"""

import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import Refuse
from faults.test_signals import start
from helpers.budget import slow
from helpers.tiny import Tiny, break_off, die, differing, finish, results
from megashear.checkpoint.checkpoint_store import list_checkpoints, newest_valid
from megashear.errors import CheckpointError, StorageError
from megashear.files.file_digests import write_manifest
from megashear.model import weight_io as write


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed after pruning's step 7, with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert break_off(tiny.config(folder, "checkpoint.interval=2"), ("prune", 7), die)
    assert [path.name for path in list_checkpoints(folder / "prune")] == ["step-00000006", "step-00000004"]
    return folder


@pytest.fixture
def run_folder(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_damaged_newest_checkpoint(
    tiny: Tiny, run_folder: Path, unbroken: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = list_checkpoints(run_folder / "prune")
    damaged = newest / "weights/__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 4
    damaged.write_bytes(content)
    # One kept checkpoint: the damaged one must not push out what is saved before its step comes again.
    overrides = ["checkpoint.interval=1", "checkpoint.keep=1"]
    assert break_off(tiny.config(run_folder, *overrides), ("prune", 5))
    assert f"{newest} is damaged and left alone ({damaged}: its SHA-256" in caplog.text
    assert (run_folder / "prune/step-00000005").is_dir() and not older.exists()
    finish(tiny.config(run_folder, *overrides))
    assert differing(results(run_folder), unbroken) == []


def test_every_kind_of_damage_is_found(run_folder: Path) -> None:
    """300 seeded mutations: flipped bits, truncations, growth, missing files; never a crash, never silence."""
    newest, older = list_checkpoints(run_folder / "prune")
    draw = random.Random(5)
    for number in range(300):
        path = draw.choice(files_of(newest))
        content = path.read_bytes()
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        kinds = {
            "flip": content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :],
            "truncate": content[:place],
            "grow": content + b"\0",
        }
        kind = draw.choice([*kinds, "remove"])
        if kind == "remove":
            path.unlink()
        else:
            path.write_bytes(kinds[kind])
        # A bit of the manifest's own white space or of a key that nothing reads damages nothing.
        harmless = path.name == "manifest.json" and kind in ("flip", "grow")
        found = newest_valid(run_folder / "prune")
        assert found == older or (harmless and found == newest), (number, path, kind)
        path.write_bytes(content)
    assert newest_valid(run_folder / "prune") == newest


def test_all_damaged(tiny: Tiny, run_folder: Path, refused: Refuse) -> None:
    for path in list_checkpoints(run_folder / "prune"):
        (path / "state.json").write_text("{}")
    before = {str(path): path.read_bytes() for path in files_of(run_folder / "prune")}
    refused(5, [f"{run_folder}/prune: every checkpoint is damaged"], "run", tiny.file(run_folder))
    assert {str(path): path.read_bytes() for path in files_of(run_folder / "prune")} == before


class Hostile:
    """Something that acts when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["weights/.metadata", "weights/common.pt", "masks.safetensors", "weights/__0_0.distcp"]
)
def test_a_hostile_checkpoint_runs_no_code(
    tiny: Tiny, run_folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a manifest of its digests it is whole, and still nothing in it is run."""
    newest, older = list_checkpoints(run_folder / "prune")
    canary = tmp_path / "canary"
    (newest / name).write_bytes(pickle.dumps(Hostile(canary)))
    (newest / "manifest.json").unlink()
    write_manifest(newest, {"step": 6})
    if name == "weights/.metadata":
        assert newest_valid(run_folder / "prune") == older
        assert "which no checkpoint of megashear holds and which could run code" in caplog.text
    else:
        with pytest.raises(BaseException) as caught:
            finish(tiny.config(run_folder))
        assert not isinstance(caught.value, KeyboardInterrupt | SystemExit)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))
    assert canary.exists(), "the canary would have sung"


def test_finalizing_needs_the_masks_of_the_last_step(tiny: Tiny, tmp_path: Path, refused: Refuse) -> None:
    """An older checkpoint has older masks than the model that is to be cut: they must not be taken for it."""
    assert break_off(tiny.config(tmp_path / "run"), ("prune", 8))
    last = tmp_path / "run/prune/step-00000008"
    (last / "masks.safetensors").write_bytes(b"")
    refused(5, [f"{last}: missing or damaged", "masks of pruning's last step"], "run", tiny.file(tmp_path / "run"))
    assert not (tmp_path / "run/pruned").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: room for one checkpoint of the tiny run, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny: Tiny, small_disk: Path, tmp_path: Path, unbroken: dict[str, Any], refused: Refuse) -> None:
    """The run ends with code 7, the older checkpoint loads, and with space again the run goes on from it."""
    (small_disk / "filler").write_bytes(bytes(900_000))
    folder = small_disk / "run"
    tiny.file(tmp_path / "run").rename(tmp_path / "run.yaml")
    file = tmp_path / "run.yaml"
    overrides = [f"run.folder={folder}", "checkpoint.interval=3"]
    refused(7, [f"{folder}/prune/step-00000006: could not be written (the disk is full)"], "run", file, *overrides)
    assert newest_valid(folder / "prune") == folder / "prune/step-00000003"
    left = sorted(path.name for path in (folder / "prune").iterdir())
    assert left == ["heldout.json", "step-00000003"], "nothing of the new one stays"
    shutil.move(folder, tmp_path / "run")
    finish(tiny.config(tmp_path / "run"))
    assert differing(results(tmp_path / "run"), unbroken) == []


@pytest.mark.parametrize("name", ["publish_folder", "seal_folder", "write_settings"])
def test_a_full_disk_while_the_model_is_written(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, name, full)
    with pytest.raises(StorageError, match=r"masked: could not be written .the disk is full"):
        finish(tiny.config(tmp_path / "run", "run.phases=[prune]"))
    assert not list((tmp_path / "run").glob("*masked*"))
    monkeypatch.undo()
    finish(tiny.config(tmp_path / "run", "run.phases=[prune]"))
    assert (tmp_path / "run/masked/model.safetensors").read_bytes() == unbroken["masked/model.safetensors"]


def kill_while_saving(tiny: Tiny, folder: Path, kills: int, seed: int) -> int:
    """Kill a run that saves in every step at random moments, until it is done or `kills` times; returns the kills."""
    draw = random.Random(seed)
    file = tiny.file(folder, checkpoint={"interval": 1})
    for number in range(kills):
        process = start(file)
        while process.poll() is None and not list(folder.glob("*/.step-*")):
            time.sleep(0.005)
        try:
            process.wait(timeout=draw.random() * 0.3)
            return number
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for phase in ("prune", "pretrain"):
            for path in list_checkpoints(folder / phase):
                assert newest_valid(path.parent) is not None
    return kills


@pytest.mark.medium
@pytest.mark.parametrize("kills", [2, *slow(60)])
def test_killed_while_saving(tiny: Tiny, tmp_path: Path, unbroken: dict[str, Any], kills: int) -> None:
    """kill -9 of the whole group while a checkpoint is written: it is whole or absent, and the run goes on."""
    assert kill_while_saving(tiny, tmp_path / "run", kills, seed=kills) > 0
    finish(tiny.config(tmp_path / "run"))
    assert differing(results(tmp_path / "run"), unbroken) == []
    assert not list((tmp_path / "run").glob("*/.step-*")), "what a kill left behind is cleared away"


def test_a_checkpoint_of_other_masks_is_refused(run_folder: Path, tiny: Tiny) -> None:
    from megashear.checkpoint.checkpoint_store import read_masks

    with pytest.raises(CheckpointError, match="holds no masks"):
        read_masks(run_folder)
