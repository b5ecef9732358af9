"""Recipes hold every key with its meaning and pass `megashear check`; scripts stop and requeue as they say."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.budget import slow
from megashear.config import config_keys as keys
from megashear.config.config_reference import recipe_text
from megashear.config.load import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("llama*.yaml"))
SCRIPTS = [EXAMPLES / name for name in ("torchrun_one_node.sh", "torchrun_many_nodes.sh", "slurm.sbatch")]
REFERENCES = {
    "llama2-7b-to-1.3b": [1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251],
    "llama2-7b-to-2.7b": [1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328],
    "llama2-13b-to-7b": [1.7520, 0.6216, 1.9063, 1.4482, 1.4844, 1.2637, 1.9219],
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_stands_with_its_meaning(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert recipe_text(text) == text
    tree = yaml.safe_load(text)
    for key in keys.leaf_keys().values():
        node = tree
        for part in key.path:
            node = node[part]
        assert re.search(rf"^ *# {re.escape(key.help)}\n *{key.path[-1]}:", text, re.MULTILINE), key.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_the_check_on_a_machine_without_weights_and_data(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megashear", "check", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^not checked: ", done.stdout, re.MULTILINE)) == 2
    assert "warning" not in done.stdout


def test_recipes_are_those_that_the_documentation_promises() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {"llama2-13b-to-7b", "llama2-7b-to-1.3b", "llama2-7b-to-2.7b", "llama3-8b-to-4b"}
    assert {load_config(path).parallel.world_size for path in RECIPES} == {8, 16, 64}


@pytest.mark.parametrize("name", REFERENCES)
def test_published_schedule_weights_and_references(name: str) -> None:
    config = load_config(EXAMPLES / f"{name}.yaml")
    domains = ["cc", "github", "book", "stackexchange", "wikipedia", "arxiv", "c4"]
    assert config.mixture.initial_weights == dict(
        zip(domains, [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15], strict=True)
    )
    assert config.mixture.reference_losses == dict(zip(domains, REFERENCES[name], strict=True))
    prune, pretrain = config.prune, config.pretrain
    assert (prune.batch.steps, prune.batch.global_batch, config.data.sequence_length) == (3200, 32, 4096)
    assert (prune.optimizer.warmup_steps, prune.sparsity_warmup_steps, prune.batch.eval_interval) == (320, 640, 50)
    assert (pretrain.batch.steps, pretrain.batch.global_batch, pretrain.optimizer.warmup_steps) == (48000, 256, 1440)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_how_they_are_used(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    done = subprocess.run(["bash", path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


STAND_IN = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
line = " ".join(["ready", os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]])
os.write(1, (line + chr(10)).encode())  # in one piece: two ranks share the pipe
time.sleep(60)
"""


def stand_in(folder: Path) -> dict[str, str]:
    """A training that waits to be told to stop, in the place of ours, and the environment that finds it."""
    (folder / "megashear").mkdir()
    (folder / "megashear" / "__init__.py").touch()
    (folder / "megashear" / "__main__.py").write_text(STAND_IN)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "GPUS": "2", "OMP_NUM_THREADS": "1"}


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGUSR1, *slow(signal.SIGTERM, signal.SIGINT)])
def test_a_signal_to_the_torchrun_script_reaches_the_ranks_and_ends_in_75(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        ["bash", SCRIPTS[0], "x.yaml", "a=b"],
        cwd=tmp_path,
        env=stand_in(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and they hand that on: not what is tested here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = sorted(process.stdout.readline() for _ in range(2))
    assert lines == ["ready 0 2 run x.yaml a=b\n", "ready 1 2 run x.yaml a=b\n"]
    process.send_signal(number)
    assert process.wait(timeout=30) == 75


SRUN = """#!/usr/bin/env bash
# Starts one task, as Slurm would start each.
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
"$@" &
task=$!
sleep 2
kill "$SIGNAL" $task
wait $task
"""


@pytest.mark.medium
@pytest.mark.parametrize(("number", "status", "requeued"), [("-USR1", 75, True), ("-KILL", 137, False)])
def test_the_slurm_script_requeues_on_75_alone(tmp_path: Path, number: str, status: int, requeued: bool) -> None:
    environment = stand_in(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/usr/bin/env bash\necho "scontrol $*"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment |= {"PATH": f"{tools}:{environment['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(
        ["bash", SCRIPTS[2], "x.yaml"],
        cwd=tmp_path,
        env={**environment, "SIGNAL": number},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ready 0 1 run x.yaml" in done.stdout
    assert done.returncode == status
    assert ("scontrol requeue 7" in done.stdout) is requeued
    directives = re.findall(r"^#SBATCH (\S+)", SCRIPTS[2].read_text(), re.MULTILINE)
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(directives)
