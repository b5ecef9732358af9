"""Commands in README.md and docs/ run, on a tiny random model; links, exit codes and paths are valid.

Blocks of the documentation after `<!-- cluster -->` need a cluster, those after `<!-- quick start -->` a finished quick
start. The set-up commands are run by CI and tests/examples/test_quickstart.py, the SmolLM2 example by its slow test,
and the scripts for sbatch and several nodes by tests/examples/test_recipes.py.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.inputs import make_llama, make_tokenizer
from helpers.ranks import LiveRanks
from megashear import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
RUN_ELSEWHERE = (
    "bash examples/quickstart.sh",
    "bash tests/run.sh",
    "source .venv/bin/activate",
    "sbatch examples/slurm.sbatch my.yaml run.seed=2",
    "NODES=2 HEAD=node0 bash examples/torchrun_many_nodes.sh my.yaml",
)
SMALL = [
    "target.hidden_size=48",
    "target.num_layers=2",
    "target.num_heads=2",
    "target.intermediate_size=64",
    "data.sequence_length=32",
    "precision=fp32",
    "prune.batch.steps=3",
    "prune.batch.global_batch=2",
    "prune.batch.eval_interval=2",
    "prune.batch.eval_sequences=2",
    "pretrain.batch.steps=2",
    "pretrain.batch.global_batch=2",
    "pretrain.batch.eval_interval=1",
    "pretrain.batch.eval_sequences=2",
]


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a language, without those that a comment in the line before marks as run elsewhere."""
    pattern = rf"(?<!-->\n)^```{language}\n(.*?)^```"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    for block in blocks(text, "bash"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what a reader has: HF_FOLDER, texts, my.yaml; and examples/, tools/ as in the checkout."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "tools", "megashear"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "texts").mkdir()
    paragraphs = [text for text in README.split("\n\n") if len(text) > 40] * 20
    for domain in ("web", "books"):
        lines = [json.dumps({"text": f"{domain} {number} {text}"}) for number, text in enumerate(paragraphs)]
        (folder / "texts" / f"{domain}_00000.jsonl").write_text("\n".join(lines) + "\n")
    make_llama(
        folder / "HF_FOLDER",
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    make_tokenizer(folder / "HF_FOLDER" / "tokenizer.json", 400, paragraphs)
    (folder / "my.yaml").write_text(blocks(README, "yaml")[0])
    return folder


def made_small(command: str) -> str:
    """The command with the run file's sizes and steps cut down: what a tiny model and two cores can do."""
    words = command.replace("GPUS=8", "GPUS=2").split(" ")
    if "my.yaml" in words:
        words += SMALL
    if "check" in words and "my.yaml" in words:  # eight ranks are four replicas
        words += ["prune.batch.global_batch=4", "pretrain.batch.global_batch=4"]
    elif "GPUS=2" not in words:
        words += ["parallel.tensor=1", "parallel.sequence=false"] if "my.yaml" in words else []
    return " ".join(words).replace("--sequence-length 2048", "--sequence-length 32")


def run(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line by bash, as a user does."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MEGASHEAR_DEVICE": "cpu",
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def execute(command: str, ranks: LiveRanks, monkeypatch: pytest.MonkeyPatch) -> int:
    """Execute a command line in this process, or on live ranks in place of a launch script's; returns the exit code."""
    words = shlex.split(command)
    if words[0] == "megashear":
        return cli.main(words[1:])
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0
    assert words[:3] == ["GPUS=2", "bash", "examples/torchrun_one_node.sh"], f"{command}: nothing here runs it"
    done = ranks(2).call("helpers.jobs:command", arguments=["run", *words[3:]], folder=str(Path.cwd()))
    print(done["output"], done["errors"])
    return int(done["code"])


@pytest.mark.expensive("all commands of README and docs, a run on two ranks among them")
def test_every_command_works_in_order(
    ranks: LiveRanks, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    done = [command for command in dict.fromkeys([*commands(README), *commands(DOCS)]) if command not in RUN_ELSEWHERE]
    assert len(done) >= 20
    for command in done:
        code = execute(made_small(command), ranks, monkeypatch)
        assert code == 0, f"{command}\n{capfd.readouterr()}"
    summary = json.loads((workplace / "runs" / "mine" / "summary.json").read_text())
    assert list(summary["losses"]) == ["source", "pruned", "final"]
    assert (workplace / "models" / "smaller" / "model.safetensors").is_file()
    for name in ("masked", "pruned", "final", "export", "metrics.jsonl", "plots"):
        assert (workplace / "runs" / "mine" / name).exists(), name


def test_commands_run_elsewhere_are_in_the_readme_and_parse() -> None:
    listed = list(commands(README))
    for command in RUN_ELSEWHERE:
        assert command in listed
        assert run(f"bash -n -c {shlex.quote(command)}").returncode == 0
        script = next((word for word in command.split() if word.startswith(("examples/", "tests/"))), None)
        assert script is None or (ROOT / script).is_file()


@pytest.mark.slow
def test_the_smollm2_example_with_a_few_steps(tmp_path: Path) -> None:
    steps = ["prune.batch.steps=2", "prune.batch.eval_interval=2", "prune.batch.eval_sequences=1"]
    steps += ["pretrain.batch.steps=2", "pretrain.batch.eval_interval=2", "pretrain.batch.eval_sequences=1"]
    result = run(f"bash examples/smollm2.sh {shlex.quote(str(tmp_path / 'run'))} {' '.join(steps)}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "sheared" / "summary.json").read_text())
    assert 0.45 < summary["parameters"]["final"] / summary["parameters"]["source"] < 0.55
    assert "LlamaForCausalLM" in result.stdout


def test_exit_codes_and_verbs_are_documented() -> None:
    help_text = cli._parser().format_help()
    codes = set(re.findall(r"^ +(\d+)  ", help_text, re.MULTILINE))
    troubleshooting = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert codes == set(re.findall(r"^\| (\d+) \|", troubleshooting, re.MULTILINE))
    verbs = set(re.findall(r"^    (\w+) {2,}\w", help_text.split("exit codes:")[0], re.MULTILINE))
    for verb in verbs:
        assert f"megashear {verb}" in README + DOCS, verb


def anchors(page: Path) -> list[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in PAGES)])
def test_links_and_paths_are_valid(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
        if "://" in link:
            continue
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), anchor
    if "notebook" in page:  # paths there are those of their date
        return
    for path in re.findall(r"`((?:megashear|examples|tests|tools|docs|csrc)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert str(page.relative_to(ROOT / "docs")) in navigation, page
