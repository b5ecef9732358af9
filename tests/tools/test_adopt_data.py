import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megashear.dataset.dataset_folder import Dataset
from megashear.dataset.indexed import IndexedWriter
from tools.adopt_data import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(models.WordLevel({f"w{n}": n for n in range(300)}, "w1")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "w0"}')
    return folder


def pair(prefix: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(60):
            writer.add_document(np.append(random.integers(1, 300, 20), 0))
    return str(prefix)


def test_one_command(tmp_path, tokenizer):
    """As a user runs it: in a process of its own."""
    pairs = [f"web={pair(tmp_path / 'a', 0)}", f"code={pair(tmp_path / 'b', 1)}.bin"]
    given = [*pairs, "--tokenizer", str(tokenizer), "--output", str(tmp_path / "d"), "--sequence-length", "40"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/adopt_data.py"), *given, "--heldout-sequences", "3"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "web: train" in done.stdout and "code: heldout" in done.stdout
    dataset = Dataset.open(tmp_path / "d")
    dataset.verify()
    assert sorted(dataset.domains) == ["code", "web"] and len(dataset.stream("web", "heldout")) >= 3 * 41


def test_held_out_pairs(tmp_path, tokenizer):
    web, held = f"web={pair(tmp_path / 'a', 0)}", f"web={pair(tmp_path / 'h', 2)}"
    output = str(tmp_path / "d")
    assert main([web, "--heldout", held, "--tokenizer", str(tokenizer), "--output", output]) == 0
    assert Dataset.open(tmp_path / "d").counts["web"]["heldout"]["documents"] == 60


@pytest.mark.parametrize(
    "given, code, message",
    [
        (["web"], 2, "give NAME=PREFIX"),
        (["a/b=x"], 2, "the domain name 'a/b'"),
        (["web=x", "web=y"], 2, "named twice"),
        (["web=x", "--heldout", "code=y"], 2, "name all of them or none"),
        (["web=x", "--heldout-fraction", "2"], 2, "are shares"),
        (["web=nowhere"], 3, "nowhere.bin: cannot be read"),
    ],
)
def test_errors_are_one_message(tmp_path, tokenizer, capsys, given, code, message):
    words = [*given, "--tokenizer", str(tokenizer), "--output", str(tmp_path / "d")]
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("adopt_data: ") and not (tmp_path / "d").exists()


def test_tokenizer_and_output_are_required(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["web=x"])
    assert ended.value.code == 2
    assert "--tokenizer, --output" in capsys.readouterr().err
