"""Input that cannot be used: one message that says what, where and what to do, the documented code, nothing touched."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import Refuse
from helpers.inputs import TEXTS, make_dataset, make_tokenizer
from helpers.ranks import torchrun
from helpers.tiny import Tiny
from megashear.files.lock import run_lock


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("prune.batch.step=5", 2, ["unknown key prune.batch.step", "did you mean steps?"]),
        ("pruning.batch.steps=5", 2, ["unknown key pruning", "did you mean prune"]),
        ("prune.batch.steps=many", 2, ["prune.batch.steps", "many"]),
        ("target.num_layers=9", 2, ["target", "layers", "9", "5"]),
        ("target.hidden_size=64", 2, ["target", "hidden", "64", "32"]),
        ("parallel.tensor=3", 2, ["tensor", "3"]),
        ("parallel.pipeline=2", 2, ["pipeline"]),
        ("prune.batch.global_batch=7", 2, ["prune.batch", "7"]),
        ("source.folder=/nowhere", 4, ["source.folder: /nowhere is no folder", "megashear import"]),
        ("data.folder=/nowhere", 3, ["/nowhere/manifest.json: not found"]),
        ("mixture.initial_weights={library: 1}", 2, ["mixture.initial_weights", "command"]),
        ("data.sequence_length=100000", 2, ["sequence", "100000"]),
    ],
)
def test_a_run_file_that_cannot_run(
    tiny: Tiny, tmp_path: Path, refused: Refuse, override: str, code: int, words: list[str]
) -> None:
    refused(code, words, "run", tiny.file(tmp_path / "run"), override)
    assert not (tmp_path / "run/prune").exists()


def test_a_dataset_of_another_tokenizer(tiny: Tiny, tmp_path: Path, refused: Refuse) -> None:
    make_tokenizer(tmp_path / "tokenizer.json", 390)
    make_dataset(tmp_path / "data", tmp_path / "tokenizer.json", TEXTS)
    file = tiny.file(tmp_path / "run")
    words = ["made with another tokenizer", str(tiny.source), "preprocess the data again"]
    refused(3, words, "run", file, f"data.folder={tmp_path / 'data'}")


def test_an_empty_domain(tiny: Tiny, tmp_path: Path, refused: Refuse) -> None:
    make_dataset(tmp_path / "data", tiny.source / "tokenizer.json", TEXTS | {"nothing": ""})
    file = tiny.file(tmp_path / "run")
    refused(2, ["domain nothing has 0 training tokens"], "run", file, f"data.folder={tmp_path / 'data'}")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize(
    "name", ["help.train.bin", "help.train.idx", "library.heldout.bin", "tokenizer/tokenizer.json"]
)
def test_a_damaged_dataset(tiny: Tiny, tmp_path: Path, refused: Refuse, name: str, damage: Any) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    damage(tmp_path / "data" / name)
    path = tmp_path / "data" / name
    refused(3, [str(path)], "run", tiny.file(tmp_path / "run"), f"data.folder={tmp_path / 'data'}")


def test_a_damaged_imported_source(tiny: Tiny, tmp_path: Path, refused: Refuse) -> None:
    from megashear.hf.import_model import import_model

    import_model(tiny.source, tmp_path / "source")
    flip(tmp_path / "source/model.safetensors")
    file = tiny.file(tmp_path / "run", source={"folder": str(tmp_path / "source")})
    refused(4, [f"{tmp_path}/source/model.safetensors: its SHA-256"], "run", file)


def test_the_folder_of_another_run(tiny: Tiny, unbroken_folder: Path, refused: Refuse) -> None:
    before = tree(unbroken_folder)
    changes = ["prune.batch.steps=9", "mixture.eta=2.5", "target.intermediate_size=40"]
    words = ["prune.batch.steps: 8 -> 9", "mixture.eta: 1.0 -> 2.5", "target.intermediate_size: 32 -> 40", "run.folder"]
    refused(5, words, "run", tiny.file(unbroken_folder), *changes)
    lock = f"{unbroken_folder}/.lock"
    assert tree(unbroken_folder) | {lock: b""} == before | {lock: b""}


def test_a_folder_that_another_process_holds(tiny: Tiny, tmp_path: Path, refused: Refuse) -> None:
    with run_lock(tmp_path / "run"):
        refused(8, [f"{tmp_path}/run: in use by process"], "run", tiny.file(tmp_path / "run"))
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run/.lock"]


@pytest.mark.parametrize(("verb", "words"), [("finalize", "pruning is not finished"), ("pretrain", "not finalized")])
def test_a_phase_whose_turn_it_is_not(tiny: Tiny, tmp_path: Path, refused: Refuse, verb: str, words: str) -> None:
    refused(5, [words, "first"], verb, tiny.file(tmp_path / "run"))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.folder={folder}", "made with another tokenizer"),
        pytest.param("target.num_layers=9", "num_layers", marks=pytest.mark.slow),
    ],
    ids=["dataset", "config"],
)
def test_under_torchrun_a_message_is_printed_once(tiny: Tiny, tmp_path: Path, override: str, words: str) -> None:
    """By rank 0 itself, unless torchrun ended it because another rank met the error first; torchrun then shows it."""
    make_tokenizer(tmp_path / "tokenizer.json", 390)
    make_dataset(tmp_path / "data", tmp_path / "tokenizer.json", TEXTS)
    done = torchrun(2, "megashear", "run", tiny.file(tmp_path / "run"), override.format(folder=tmp_path / "data"))
    errors = [line for line in done.stderr.splitlines() if "megashear: error: " in line]
    assert len(errors) <= 1 and words in done.stderr
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError(") == 1, (
        "only torchrun's own traceback"
    )
