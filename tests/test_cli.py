"""The command line as a user meets it: real processes, their output and exit codes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megashear import cli, errors

VERBS = (
    *("import", "check", "run", "prune", "finalize", "pretrain", "export", "eval", "mixture", "env", "plot", "report"),
)
GOOD = """
source: {shape: {preset: llama2-7b}}
target: {preset: sheared-1.3b}
data: {folder: nowhere}
mixture: {rule: static}
parallel: {world_size: 4}
"""


def megashear(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megashear", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_help_names_every_verb_and_every_exit_code_and_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = megashear("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    for verb in VERBS:
        assert re.search(rf"^    {verb} ", done.stdout, re.MULTILINE), verb
    codes = {value.exit_code for value in vars(errors).values() if isinstance(value, type)}
    for code in codes | {0, cli.INTERNAL_ERROR, cli.KEYBOARD_INTERRUPT}:
        assert re.search(rf"^ *{code}  ", done.stdout, re.MULTILINE), code
    assert min(seconds) < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"megashear {verb}" in capsys.readouterr().out


def test_version() -> None:
    assert re.fullmatch(r"megashear \d+\.\d+\.\d+\n", megashear("--version").stdout)


def test_check_prints_the_plan(good: Path) -> None:
    done = megashear("check", good, "prune.batch.steps=10", "prune.batch.eval_interval=20", "mixture.rule=static")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "6,738,415,616  1,345,423,360" in done.stdout
    assert "Memory per rank" in done.stdout
    assert "Disk space" in done.stdout
    assert "not checked: domains and tokens: nowhere is not on this machine" in done.stdout


def test_check_shows_tokens_wanted_and_there(good: Path, tmp_path: Path) -> None:
    splits = {"train": {"tokens": 10**9, "documents": 1}, "heldout": {"tokens": 10**6, "documents": 1}}
    content = {"domains": {"cc": splits, "book": splits}, "tokenizer": {"vocab_size": 32000}, "files": {}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(content))
    done = megashear("check", good, f"data.folder={tmp_path / 'data'}")
    assert done.returncode == 0
    assert re.search(r"^cc +0\.21 +25\.17 +25\.38 !$", done.stdout, re.MULTILINE)
    assert "warning: data: domain book would be read 25.4 times" in done.stdout


def test_presets() -> None:
    done = megashear("check", "--presets")
    assert done.returncode == 0
    assert re.search(r"^sheared-2\.7b .* 2\.70 B$", done.stdout, re.MULTILINE)
    assert megashear("check").returncode == 2


def test_every_problem_of_a_run_file_is_a_line_without_a_traceback(good: Path) -> None:
    done = megashear("check", good, "run.sead=1", "precision=fp64")
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(":")[:2] for line in done.stderr.splitlines()] == [["megashear", " error"]] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "none.yaml"], 2, "none.yaml: cannot be read"),
        (["import", "/nowhere", "/nowhere2"], 4, "/nowhere"),
        (["plot", "/nowhere"], 3, "/nowhere"),
        (["report", "/nowhere"], 3, "/nowhere"),
        (["frobnicate"], 2, "invalid choice"),
        (["eval", "a", "b", "--sequences", "0"], 2, "'0' is not a whole number above 0"),
        (["export", "a", "b", "--max-shard-gb", "nan"], 2, "'nan' is not a size above 0"),
    ],
)
def test_errors_of_users_have_their_code(arguments: list[str], code: int, words: str) -> None:
    done = megashear(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_phase_that_the_run_file_does_not_name(good: Path) -> None:
    done = megashear("prune", good, "run.phases=[pretrain]")
    assert done.returncode == 2
    assert "run.phases: it does not name prune" in done.stderr


def test_weights_that_are_not_there_are_told_before_torch_is_loaded(good: Path) -> None:
    done = megashear("run", good, "source.folder=/nowhere")
    assert done.returncode == 4
    assert "source.folder: /nowhere is no folder; run `megashear import` first" in done.stderr


def test_of_all_ranks_the_first_prints_and_the_others_tell_torchrun(tmp_path: Path) -> None:
    place = tmp_path / "error.json"
    first = megashear("check", "none.yaml", RANK="0", TORCHELASTIC_ERROR_FILE=str(place))
    assert first.stderr.startswith("megashear: error: none.yaml")
    place.unlink()
    other = megashear("check", "none.yaml", RANK="3", TORCHELASTIC_ERROR_FILE=str(place))
    assert (other.returncode, other.stderr) == (2, "")
    assert json.loads(place.read_text())["message"]["message"].startswith("none.yaml: cannot be read")
    alone = megashear("check", "none.yaml", RANK="3")
    assert alone.stderr.startswith("megashear (rank 3): error: none.yaml")


def test_a_fault_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.VERBS, "check", lambda _: {}["gone"])
    assert cli.main(["check"]) == cli.INTERNAL_ERROR
    text = capsys.readouterr().err
    assert "KeyError: 'gone'" in text
    assert "internal error; please report it" in text


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "check", interrupted)
    assert cli.main(["check"]) == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m megashear check --presets | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, cli.BROKEN_PIPE)
    assert done.stderr == ""


def test_env_lists_versions() -> None:
    done = megashear("env")
    assert done.returncode == 0
    assert "torch" in done.stdout
