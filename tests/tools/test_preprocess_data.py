import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.budget import slow
from helpers.processes import processes_of
from megashear.dataset.dataset_folder import Dataset

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "preprocess_data.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text(SCRIPT.read_text() * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Eight shards of 300 documents in RedPajama's form."""
    folder = tmp_path_factory.mktemp("shards")
    words = SCRIPT.read_text().split()
    for shard in range(8):
        with open(folder / f"part_{shard:05d}.jsonl", "w") as file:
            for n in range(300):
                text = f"{shard} {n} " + " ".join(words[(7 * n + shard) % 300 :][: 30 + n])
                name = "RedPajamaGithub" if n % 2 else "RedPajamaC4"
                file.write(json.dumps({"text": text, "meta": json.dumps({"redpajama_set_name": name})}) + "\n")
    return folder


def command(shards, model, output, *more) -> list[str]:
    return [sys.executable, str(SCRIPT), str(shards), "--tokenizer", str(model), "--output", str(output), *more]


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, check=False)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


OPTIONS = ("--sequence-length", "64", "--heldout-sequences", "20", "--domain-map", "code=*Github")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, shards, model) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "dataset"
    done = run(shards, model, output, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "RedPajamaC4" in done.stdout and "code" in done.stdout and "2,400 lines, 0 bad" in done.stdout
    assert "tokenise: 100.0%" in done.stderr and "tokens/s" in done.stderr
    return output


def test_the_dataset(unbroken):
    dataset = Dataset.open(unbroken)
    dataset.verify()
    assert "RedPajamaC4" in (unbroken / "report.txt").read_text()
    assert (unbroken / "report.png").read_bytes().startswith(b"\x89PNG")
    assert dataset.domains == ["RedPajamaC4", "code"]
    for domain in dataset.domains:
        assert len(dataset.stream(domain, "heldout")) >= 20 * 65
        assert sum(dataset.pair(domain, split).documents for split in ("train", "heldout")) == 1200


@pytest.mark.parametrize("finished", [3, *slow(0, 6)])
@pytest.mark.medium
def test_killed_and_started_again_it_ends_in_the_same_bytes(tmp_path, shards, model, unbroken, finished):
    """SIGKILL when so many shards are done: nothing that looks finished is left, and no process."""
    output = tmp_path / "dataset"
    work = tmp_path / "dataset.parts"
    process = subprocess.Popen(
        command(shards, model, output, *OPTIONS, "--workers", "3"),
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(list(work.glob("[!.]*"))) < finished:
        time.sleep(0.002)
    if finished == 0:
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not output.exists()
    assert processes_of(process.pid) == []
    kept = len(list(work.glob("[!.]*")))
    done = run(shards, model, output, *OPTIONS, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert kept >= finished and f"8 shards ({kept} from before)" in done.stdout
    assert content_of(output) == content_of(unbroken)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".tmp")] == ["dataset"]


@pytest.mark.slow
def test_fifty_kills(tmp_path, shards, model, unbroken):
    """R3: killed at 50 random moments, with 1 to 4 workers, also while merging; the last run ends in the same bytes.

    Alone: `pytest --import-mode=importlib tests/tools/test_preprocess_data.py -k fifty_kills`, some minutes.
    """
    dice, kills = random.Random(0), 0
    whole = content_of(unbroken)
    output = tmp_path / "dataset"
    while kills < 50:
        words = command(shards, model, output, *OPTIONS, "--workers", str(dice.randint(1, 4)))
        process = subprocess.Popen(
            words, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=dice.uniform(0.2, 4.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert processes_of(process.pid) == []
        if output.exists():
            assert content_of(output) == whole
            shutil.rmtree(output)
    assert run(shards, model, output, *OPTIONS).returncode == 0
    assert content_of(output) == whole


@pytest.mark.medium
def test_errors_are_one_message_and_their_exit_code(tmp_path, shards, model):
    cases = [
        (3, "no shard there", (tmp_path / "none", model, tmp_path / "d")),
        (3, "not found", (shards, tmp_path / "tokenizer.model", tmp_path / "d")),
        (3, "lines are bad", (shards, model, tmp_path / "d", "--text-key", "content")),
        (3, "--domain-map", (shards, model, tmp_path / "d", "--domain-map", "nothing")),
        (2, "--domain", (shards, model, tmp_path / "d", "--domain", "a/b")),
        (2, "--workers 0", (shards, model, tmp_path / "d", "--workers", "0")),
        (7, "could not be written", (shards, model, model / "d")),
    ]
    for code, message, arguments in cases:
        done = run(*arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert message in done.stderr.splitlines()[-1] and done.stderr.count("preprocess_data: ") == 1
        assert not (tmp_path / "d").exists()


def test_a_dry_run_writes_nothing(tmp_path, shards, model):
    done = run(shards, model, tmp_path / "d", *OPTIONS, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "8 of 8 shards" in done.stdout and "code" in done.stdout and "disk:" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.medium
def test_duplicates_are_left_out_on_request(tmp_path, shards, model):
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a_0.jsonl", "b_0.jsonl"):
        (twice / name).write_bytes((shards / "part_00000.jsonl").read_bytes())
    done = run(twice, model, tmp_path / "d", "--drop-duplicates", "--domain", "all", "--heldout-sequences", "0")
    assert done.returncode == 0, done.stderr
    assert "300 duplicates, dropped" in done.stdout and "600 lines" in done.stdout
    dataset = Dataset.open(tmp_path / "d")
    assert sum(split["documents"] for split in dataset.counts["all"].values()) == 300


def test_a_full_disk(tmp_path, shards, model):
    """A file size limit stands in for the disk: the write is refused with an OSError, as a full disk refuses it."""
    limited = f"ulimit -f 20; exec {' '.join(command(shards, model, tmp_path / 'd'))}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr and "could not be written" in done.stderr
    assert not (tmp_path / "d").exists()
