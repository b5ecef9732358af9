"""Atomic files and folders: the old content or the new one, never a part, whatever goes wrong in between."""

import errno
import json
import os
from pathlib import Path

import pytest

from megashear.errors import StorageError
from megashear.files import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    atomic.write_json(path, {"b": 1, "a": "ü"})
    atomic.write_json(path, {"b": 2, "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n "b": 2,\n "a": "ü"\n}\n'
    assert json.loads(path.read_text()) == {"b": 2, "a": "ü"}
    assert names(path.parent) == ["a.json"]


def test_json_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_a_storage_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"a\.txt: could not be written \(the disk is full\)"):
        atomic.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_real_refusal_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        atomic.write_text(tmp_path / "file" / "a.txt", "new")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic.atomic_folder(tmp_path / "run") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / text).write_text(text)
    assert names(tmp_path / "run" / "sub") == ["two"]
    assert names(tmp_path) == ["run"]


def test_files_that_forbid_writing_are_flushed_too(tmp_path: Path) -> None:
    with atomic.atomic_folder(tmp_path / "run") as temporary:
        (temporary / "a").write_text("fixed")
        (temporary / "a").chmod(0o444)
    assert (tmp_path / "run" / "a").read_text() == "fixed"


def test_a_failure_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    with atomic.atomic_folder(tmp_path / "run") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_folder(tmp_path / "run") as temporary:
        (temporary / "b").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path / "run") == ["a"]
    assert names(tmp_path) == ["run"]
