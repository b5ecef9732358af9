import json
import subprocess
import sys
from pathlib import Path

import pytest

from megashear.mixture.reference_losses import DOMAINS, LLAMA2_LOSSES, REFERENCE_LOSSES, REFERENCE_PARAMETERS

ROOT = Path(__file__).parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "fit_reference_losses.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


def as_csv() -> str:
    rows = [",".join(map(str, [size, *losses.values()])) for size, losses in LLAMA2_LOSSES.items()]
    return "\n".join([",".join(["parameters", *DOMAINS]), *rows]) + "\n"


@pytest.mark.parametrize("name, content", [("losses.json", json.dumps(LLAMA2_LOSSES)), ("losses.csv", as_csv())])
def test_published_losses_to_published_references(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    done = run(tmp_path / name, "--parameters", REFERENCE_PARAMETERS["2.7b"], "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert {k: round(v, 4) for k, v in written["references"].items()} == REFERENCE_LOSSES["2.7b"]
    assert written["laws"]["commoncrawl"]["problems"] and not written["laws"]["c4"]["problems"]
    line = next(line for line in done.stdout.splitlines() if line.startswith("commoncrawl"))
    assert "1.87" in line and "E = -2.80 is negative" in line


@pytest.mark.parametrize(
    "name, content",
    [
        ("losses.json", "{"),
        ("losses.json", "{}"),
        ("losses.json", '{"7b": {"web": 1}}'),
        ("losses.json", '{"7": {"web": 1}, "8": {"web": 1}}'),
        ("losses.csv", "size,web\n1,2\n"),
        ("losses.csv", "parameters,web,book\n1,2\n"),
        ("missing.json", None),
    ],
)
def test_tables_that_are_none(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    done = run(tmp_path / name, "--parameters", 7, "--output", tmp_path / "out.json")
    assert done.returncode == 3 and done.stderr.startswith("fit_reference_losses: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "losses.json").write_text(json.dumps(LLAMA2_LOSSES))
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "losses.json", "--parameters", 7, "--output", tmp_path / "file" / "out.json")
    assert done.returncode == 7 and "Traceback" not in done.stderr
