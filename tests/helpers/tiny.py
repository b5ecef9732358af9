"""A tiny run: a random LLaMA of transformers, a dataset of three domains, a run file; and what two runs must share.

A whole run of a few steps takes about a second of computing, so a test can make dozens.
"""

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from helpers.inputs import TEXTS, make_dataset, make_llama, make_tokenizer
from megashear.checkpoint.checkpoint_store import list_checkpoints
from megashear.config.load import load_config
from megashear.config.schema import Config
from megashear.errors import CheckpointError, Interrupted
from megashear.files.file_digests import read_manifest
from megashear.phases import summary
from megashear.phases.runner import run
from megashear.processes import stop_on_signals
from megashear.train.step import StepResult
from megashear.train.training_phase import Callback, Phase

SEQUENCE = 32
LAYOUTS = {"tensor": ["parallel.tensor=2", "parallel.sequence=true"], "pipeline": ["parallel.pipeline=2"]}
"""Overrides for two ranks."""
SOURCE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
RUN: dict[str, Any] = {
    "run": {"seed": 3, "phases": ["prune", "finalize", "pretrain"]},
    "target": {
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_query_groups": 1,
        "intermediate_size": 32,
    },
    "data": {"sequence_length": SEQUENCE},
    "mixture": {"references": "list", "reference_losses": {"library": 6.2, "command": 6.0, "help": 5.0}},
    "precision": "fp32",
    "prune": {
        # Directions of nearly equal variance may be others under another layout; here layouts are compared.
        "basis": "source",
        "batch": {"steps": 8, "global_batch": 8, "micro_batch": 2, "eval_interval": 3, "eval_sequences": 5},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "importance": {"batches": 2},
        "mask_learning_rate": 0.3,
        "lambda_learning_rate": 0.5,
    },
    "pretrain": {
        "batch": {"steps": 6, "global_batch": 8, "micro_batch": 2, "eval_interval": 2, "eval_sequences": 5},
        "optimizer": {"learning_rate": 1e-3},
    },
    "checkpoint": {"interval": 4},
    "logging": {"interval": 1, "tensorboard": False},
}


class Tiny:
    """Tokenizer, source model and dataset in one folder, and run files that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source, self.data = folder, folder / "source", folder / "data"
        self.source.mkdir(parents=True)
        make_tokenizer(self.source / "tokenizer.json", 400)
        make_llama(self.source, **SOURCE)
        make_dataset(self.data, self.source / "tokenizer.json", TEXTS)

    def file(self, folder: Path, **sections: Any) -> Path:
        """A run file of the run folder `folder`."""
        tree = RUN | {"source": {"folder": str(self.source)}} | sections
        tree["run"] = tree["run"] | {"folder": str(folder)}
        tree["data"] = {"folder": str(self.data)} | tree["data"]
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree))
        return path

    def config(self, folder: Path, *overrides: str, **sections: Any) -> Config:
        """A run's config; overrides as on the command line."""
        return load_config(self.file(folder, **sections), list(overrides))


class Killed(BaseException):
    """The process is gone at this point: nothing of ours handles this."""


class AfterStep(Callback):
    """Act after one (phase, step), before its evaluation and checkpoint; None: after every step."""

    def __init__(self, where: tuple[str, int] | None, action: Callable[[], None]) -> None:
        self.where, self.action = where, action

    def after_step(self, phase: Phase, result: StepResult) -> None:
        if self.where in (None, (phase.name, phase.counters.step)):
            self.action()


def send_signal(number: int = signal.SIGUSR1) -> None:
    """A real signal to this process."""
    os.kill(os.getpid(), number)


def die() -> None:
    raise Killed


def break_off(config: Config, where: tuple[str, int] | None, action: Callable[[], None] = send_signal) -> bool:
    """Run until a signal, or the death, after a step (None: the next one); whether there was one before the end."""
    with without_pictures(), stop_on_signals() as request:
        try:
            run(config, stop=request, callbacks=[AfterStep(where, action)])
        except (Interrupted, Killed):
            return True
    return False


def finish(config: Config) -> None:
    """Run to the end, undisturbed."""
    with without_pictures():
        run(config)


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Leave out the pictures at a run's end, which take longer than a tiny run, and what is printed."""
    with patch.object(summary, "draw_pictures", lambda _: []), contextlib.redirect_stdout(io.StringIO()):
        yield


def results(folder: Path) -> dict[str, Any]:
    """Everything in a run folder that must not depend on how often the run was stopped, by name: bytes of models, of
    the last checkpoints' weights, optimizer and masks, their states, metrics. Times are left out.
    """
    found: dict[str, Any] = {"metrics": records(folder)}
    for path in [*folder.glob("*/done.json"), *folder.glob("source_losses*.json")]:
        found[str(path.relative_to(folder))] = without_times(json.loads(path.read_text()))
    for path in folder.glob("*/model.safetensors"):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for phase in ("prune", "pretrain"):
        last = list_checkpoints(folder / phase)[0]
        files = read_manifest(last, CheckpointError)["files"]
        kept = {name: file["sha256"] for name, file in files.items() if name.endswith((".distcp", ".safetensors"))}
        found[f"{phase} {last.name}"] = (kept, without_times(json.loads((last / "state.json").read_text())))
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the results that differ."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def records(folder: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without times."""
    return [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name for name in value if not name.endswith(("seconds", "tokens_per_second"))}
        return {name: without_times(inner) for name, inner in value.items() if name in kept}
    return value
