"""Manifests: what changed on the disk is named; names that leave the folder and damaged manifests are refused."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megashear.errors import DataError
from megashear.files import file_digests as manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "sub" / "b.txt").write_text("text")
    manifest.write_manifest(tmp_path, {"kind": "test"})
    return tmp_path


def test_a_whole_folder_passes(folder: Path) -> None:
    content = manifest.read_manifest(folder, DataError)
    assert content["kind"] == "test"
    assert list(content["files"]) == ["a.bin", "sub/b.txt"]
    assert content["files"]["sub/b.txt"] == {
        "bytes": 4,
        "sha256": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1",
    }
    manifest.check_files(folder, content, DataError)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 2047), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(folder: Path, at: int, bit: int) -> None:
    path = folder / "a.bin"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[at] ^= 1 << bit
    path.write_bytes(bad)
    try:
        with pytest.raises(DataError, match=r"a\.bin: its SHA-256"):
            manifest.check_files(folder, manifest.read_manifest(folder, DataError), DataError)
    finally:
        path.write_bytes(good)


def test_sizes_are_compared_without_digests(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"a\.bin: 5 bytes, the manifest says 2048"):
        manifest.check_files(folder, manifest.read_manifest(folder, DataError), DataError, digests=False)
    (folder / "a.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin: missing"):
        manifest.check_files(folder, manifest.read_manifest(folder, DataError), DataError, digests=False)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\\b", "a\0b", ".."])
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    content = {"files": {name: {"bytes": 1, "sha256": ""}}}
    (folder / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match="leaves the folder"):
        manifest.read_manifest(folder, DataError)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}', "\xff"]
)
def test_damaged_manifests_are_refused(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="damaged or not a manifest"):
        manifest.read_manifest(folder, DataError)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: not found"):
        manifest.read_manifest(tmp_path, DataError)
