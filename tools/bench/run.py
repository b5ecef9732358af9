"""A whole pruning run against plain training of the source on the same tokens, wall time, evaluation included.

    python tools/bench/run.py OUTPUT [--steps 320] [--batch 4] [--length 256] [--threads 2] [--json FILE]

A LLaMA of 58 million parameters with random weights, on random tokens of 7 domains, is pruned to Sheared-LLaMA 1.3B's
shares of 7B by the published schedule scaled to `--steps`: targets grow over a fifth of them, and evaluation takes the
same share of the tokens as the defaults do, so that the mixture is updated 64 times, or less often where an evaluation
would have less than one sequence of each domain. Then the same model is trained on the same number of tokens. Both are
ordinary `megashear run`s; plain training is charged no evaluation.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megashear.dataset.dataset_folder import SPLITS, prefix, write_dataset_manifest
from megashear.dataset.indexed import IndexedWriter
from megashear.dataset.tokenizer import load_tokenizer
from megashear.files.atomic import atomic_folder, write_json

SOURCE = {
    "hidden_size": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_query_groups": 8,
    "head_dim": 64,
    "intermediate_size": 1376,
    "vocab_size": 32000,
}
TARGET = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_query_groups": 4, "intermediate_size": 688}
DOMAINS = 7
UPDATES = 64
EVALUATED = DOMAINS * 32 / (50 * 32)
"""Sequences evaluated per sequence trained on, by default, at the published interval and batch."""
DOCUMENT = 1000


def make_dataset(folder: Path, sequences: int, heldout: int, length: int) -> None:
    """Random tokens: `sequences` of `length` for all domains together, `heldout` for each."""
    tokenizer_folder = folder.with_name("tokenizer")
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(tokenizer_folder / "tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_folder / "tokenizer.json")
    random = np.random.default_rng(1)
    sizes = dict(zip(SPLITS, (sequences // DOMAINS + 1, heldout), strict=True))
    counts: dict[str, dict[str, dict[str, int]]] = {}
    with atomic_folder(folder) as temporary:
        for domain in (f"domain{number}" for number in range(DOMAINS)):
            for split, wanted in sizes.items():
                with IndexedWriter(prefix(temporary, domain, split), np.dtype(np.uint16)) as writer:
                    for _ in range(wanted * (length + 1) // DOCUMENT + 1):
                        drawn = random.integers(1, SOURCE["vocab_size"], DOCUMENT)
                        drawn[-1] = tokenizer.eos_id
                        writer.add_document(drawn)
                counted = {"tokens": writer.tokens, "documents": writer.documents}
                counts.setdefault(domain, {})[split] = counted
        (temporary / "tokenizer").mkdir()
        for file in tokenizer.files:
            (temporary / "tokenizer" / file.name).write_bytes(file.read_bytes())
        write_dataset_manifest(temporary, counts, tokenizer, {})


def make_tokenizer(path: Path) -> None:
    """A tokenizer.json with a word for every id; the first one ends documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<end>": 0} | {f"w{number}": number for number in range(1, SOURCE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path))
    config = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))


PUBLISHED = {
    "importance": {"criterion": None},
    "constraint": "lagrangian",
    "mask_learning_rate": 1.0,
    "lambda_learning_rate": 1.0,
    "sharpening": 1.0,
    "freeze_steps": 0,
    "clip": "joint",
}
"""The published constraint and rates, whose warm-ups take the same shares of any number of steps."""


def run_file(output: Path, name: str, steps: int, batch: int, length: int) -> dict[str, Any]:
    """The run file of `prune` or of `plain`."""
    interval = max(steps // UPDATES, math.ceil(DOMAINS / (EVALUATED * batch)))
    size: dict[str, Any] = {"steps": steps, "global_batch": batch, "micro_batch": batch}
    size |= {"eval_interval": interval, "eval_sequences": max(1, round(EVALUATED * interval * batch / DOMAINS))}
    flat = {f"domain{number}": 10.0 for number in range(DOMAINS)}
    tree = {
        "run": {"folder": str(output / name), "phases": ["prune" if name == "prune" else "pretrain"]},
        "source": {"shape": SOURCE},
        "data": {"folder": str(output / "data"), "sequence_length": length},
        "mixture": {"references": "list", "reference_losses": flat},
        "checkpoint": {"interval": steps, "keep": 1},
        "logging": {"tensorboard": False, "interval": interval},
    }
    if name == "prune":
        return tree | {"target": TARGET, "prune": {"batch": size, **PUBLISHED}}
    return tree | {"pretrain": {"batch": size | {"eval_interval": steps, "eval_sequences": 1}}}


def timed_run(output: Path, name: str, tree: dict[str, Any], threads: int) -> dict[str, float]:
    """Seconds of a run's phase and of the evaluations in it; raises SystemExit where the run fails."""
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-m", "megashear", "run", str(path)], env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    summary = json.loads((output / name / "summary.json").read_text())
    (phase,) = summary["seconds"]
    return {"seconds": summary["seconds"][phase], "evaluation": summary["evaluation_seconds"][phase]}


def main() -> None:
    """Make the data, run both, print the ratio and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True)
    sizes = (chosen.steps, chosen.batch, chosen.length)
    make_dataset(chosen.output / "data", chosen.steps * chosen.batch, 8, chosen.length)
    found = {
        name: timed_run(chosen.output, name, run_file(chosen.output, name, *sizes), chosen.threads)
        for name in ("plain", "prune")
    }
    plain = found["plain"]["seconds"] - found["plain"]["evaluation"]
    ratio, share = found["prune"]["seconds"] / plain, found["prune"]["evaluation"] / found["prune"]["seconds"]
    print(f"pruning {found['prune']['seconds']:.1f} s, plain training of the same tokens {plain:.1f} s: {ratio:.3f}")
    print(f"held-out evaluation: {share:.1%} of the pruning run")
    if chosen.json is not None:
        settings = {"steps": chosen.steps, "batch": chosen.batch, "length": chosen.length, "threads": chosen.threads}
        write_json(chosen.json, {"ratio": ratio, "evaluation_share": share, **found, **settings})


if __name__ == "__main__":
    main()
