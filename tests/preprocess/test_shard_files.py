import os

import pytest

from megashear.errors import DataError
from megashear.preprocess.shard_files import find_shards


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Shards of every form in two folders, among other files; the current folder is the one above."""
    monkeypatch.chdir(tmp_path)
    for name in ("a_00000.jsonl", "b_00000.jsonl.gz", "deep/c_00000.jsonl.zst", "deep/d.parquet", "deep/README.md"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("")
    return tmp_path / "in"


def names(paths) -> list[str]:
    return [path.name for path in paths]


EVERYTHING = ["a_00000.jsonl", "b_00000.jsonl.gz", "c_00000.jsonl.zst", "d.parquet"]


def test_folders_files_and_globs(folder):
    assert names(find_shards([str(folder)])) == EVERYTHING
    assert names(find_shards([f"{folder}/deep/*.parquet", f"{folder}/a_00000.jsonl"])) == ["a_00000.jsonl", "d.parquet"]
    assert names(find_shards([f"{folder}/**/*.zst"])) == ["c_00000.jsonl.zst"]


def test_a_list_names_files_folders_and_globs(folder):
    (folder / "list.txt").write_text("in/deep\n\n  in/*.gz  \n")
    assert names(find_shards(["@in/list.txt"])) == ["b_00000.jsonl.gz", "c_00000.jsonl.zst", "d.parquet"]


def test_order_and_spelling_of_the_inputs_change_nothing(folder):
    one = find_shards(["in/deep", "in/a_00000.jsonl"])
    assert one == find_shards(["in/a_00000.jsonl", "in/deep", "./in/deep/d.parquet"])
    os.symlink(folder / "deep", folder / "also")
    assert names(find_shards(["in"])) == EVERYTHING
    assert sorted(names(find_shards(["in", str(folder), "./in/also"]))) == EVERYTHING


def test_a_file_whose_name_begins_with_the_sign_of_a_list(folder):
    (folder.parent / "@odd.jsonl").write_text("")
    assert names(find_shards(["@odd.jsonl"])) == ["@odd.jsonl"]


@pytest.mark.parametrize(
    "given, message",
    [
        ("none", "none: no shard there"),
        ("in/*.csv", "no shard there"),
        ("in/deep/README.md", r"README\.md: not a shard"),
        ("@none.txt", r"none\.txt: the list of inputs cannot be read"),
        ("@list.txt", "missing: no shard there"),
        ("@nested.txt", "a list cannot name another list"),
    ],
)
def test_inputs_that_are_none(folder, given, message):
    (folder.parent / "list.txt").write_text("in\nmissing\n")
    (folder.parent / "nested.txt").write_text("@list.txt\n")
    with pytest.raises(DataError, match=message):
        find_shards([given])
