"""The paper's claim at sizes that two cores carry: does shearing beat training the same shape from scratch on equal
tokens?

A source LLaMA is sheared to the target's shape and continued. Rows: that with a dynamic mixture; with a static one;
units kept by magnitude (no learned masks) and continued; the same shape from scratch. All rows see equal tokens after
the source. Prints the table, writes `claim.json` and `claim.png`.

    python tools/bench/claim.py 10m DATASET OUTPUT
    python tools/bench/claim.py 50m DATASET OUTPUT --source IMPORTED_SMOLLM2

`10m` trains its source first, 10 million parameters outside the embedding, and shears it to half with a tenth of the
source's tokens for pruning and three tenths for continuing. `50m` takes SmolLM2-135M, whose tokenizer the dataset must
have. Runs are ordinary `megashear run`s below OUTPUT: interrupted, the same command goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megashear.config.presets import resolve_shape
from megashear.config.schema import ShapeConfig
from megashear.config.shape import ModelShape
from megashear.files.atomic import atomic_folder, write_json
from megashear.masks.fold import Fold
from megashear.masks.keep import keep_sets
from megashear.masks.masks import Masks
from megashear.masks.target import MaskSpec, mask_specs
from megashear.train.metrics import read_metrics
from megashear.weights.finish import seal_folder, write_settings
from megashear.weights.folder import ModelFolder
from megashear.weights.names import tensor_shapes
from megashear.weights.writer import ShardedWriter


@dataclass(frozen=True)
class Trial:
    """Shapes, steps and rates of one comparison; a step is `global_batch` sequences."""

    target: dict[str, Any]
    prune_steps: int
    pretrain_steps: int
    rate: float
    """Peak learning rate from random weights; continuing takes half of it, pruning a quarter."""
    source: dict[str, Any] | None = None
    """Shape to train first; None: a pre-trained model is given."""
    source_steps: int = 0
    global_batch: int = 8
    micro_batch: int = 8
    sequence_length: int = 256
    eval_interval: int = 100
    eval_sequences: int = 64


TRIALS = {
    "10m": Trial(
        source={
            "hidden_size": 320,
            "num_layers": 8,
            "num_heads": 10,
            "num_query_groups": 10,
            "head_dim": 32,
            "intermediate_size": 864,
            "tie_word_embeddings": False,
            "max_position_embeddings": 512,
        },
        target={
            "hidden_size": 256,
            "num_layers": 8,
            "num_heads": 8,
            "num_query_groups": 8,
            "intermediate_size": 480,
        },
        source_steps=2000,
        prune_steps=200,
        pretrain_steps=600,
        rate=1.2e-3,
    ),
    "50m": Trial(
        target={
            "hidden_size": 384,
            "num_layers": 20,
            "num_heads": 6,
            "num_query_groups": 2,
            "intermediate_size": 1024,
        },
        prune_steps=30,
        pretrain_steps=90,
        rate=1.2e-3,
        global_batch=4,
        micro_batch=4,
        eval_interval=30,
        eval_sequences=8,
    ),
}
STEPS = ("source_steps", "prune_steps", "pretrain_steps")
ROWS = {
    "sheared": "learned masks, dynamic mixture",
    "static": "learned masks, static mixture",
    "magnitude": "units by magnitude, dynamic mixture",
    "scratch": "same shape from scratch, static mixture",
}


class RunFiles:
    """The run files of a trial: one `megashear run` for the source and for each row."""

    def __init__(self, trial: Trial, dataset: str, output: Path, seed: int) -> None:
        self.trial, self.dataset, self.output, self.seed = trial, dataset, output, seed

    def source(self) -> dict[str, Any]:
        """The source's own training, on a static mixture."""
        trial = self.trial
        return self._run("source", {"shape": trial.source}, "static", pretrain=self._stage(trial.source_steps, 1.0))

    def row(self, name: str, source: ModelShape, folder: Path, references: dict[str, float]) -> dict[str, Any]:
        """One row of the table, by its name in ROWS. references: the source's held-out losses."""
        trial = self.trial
        steps = trial.prune_steps + trial.pretrain_steps
        if name == "scratch":
            shape = resolve_shape(ShapeConfig(**trial.target), source)
            keys = ShapeConfig.__dataclass_fields__.keys() & vars(shape).keys()
            small = {key: getattr(shape, key) for key in keys - {"rope_scaling"}}
            return self._run(name, {"shape": small}, "static", pretrain=self._stage(steps, 1.0))
        if name == "magnitude":
            small = {"folder": str(self.output / "by_magnitude")}
            return self._run(name, small, "paper", references, pretrain=self._stage(steps, 0.5))
        prune = self._stage(trial.prune_steps, 0.25) | {
            "mask_learning_rate": 0.1,
            "lambda_learning_rate": 0.3,
            "sparsity_warmup_steps": trial.prune_steps // 2,
            "log_alpha_init": 2.5,
            "log_alpha_limit": 3.0,
        }
        sections = {"prune": prune, "pretrain": self._stage(trial.pretrain_steps, 0.5), "target": trial.target}
        return self._run(name, {"folder": str(folder)}, "static" if name == "static" else "paper", None, **sections)

    def _stage(self, steps: int, share: float) -> dict[str, Any]:
        trial = self.trial
        batch = {
            "steps": steps,
            "global_batch": trial.global_batch,
            "micro_batch": trial.micro_batch,
            "eval_interval": min(steps, trial.eval_interval),
            "eval_sequences": trial.eval_sequences,
        }
        return {"batch": batch, "optimizer": {"learning_rate": trial.rate * share, "weight_decay": 0.1}}

    def _run(
        self, name: str, source: dict[str, Any], rule: str, references: dict[str, float] | None = None, **sections: Any
    ) -> dict[str, Any]:
        stages = ["prune", "finalize", "pretrain"] if "prune" in sections else ["pretrain"]
        mixture: dict[str, Any] = {"rule": rule}
        if references is not None:
            mixture |= {"references": "list", "reference_losses": references}
        return {
            "run": {"folder": str(self.output / name), "stages": stages, "seed": self.seed},
            "source": source,
            "data": {"folder": self.dataset, "sequence_length": self.trial.sequence_length},
            "mixture": mixture,
            "precision": "bf16",
            **sections,
        }


def unit_norms(source: ModelFolder, spec: MaskSpec) -> torch.Tensor:
    """Sum of squares of the weights that belong to each unit, in the shape of the granularity's log-alpha."""
    shape = source.shape
    scores = torch.zeros(spec.shape)
    for name in tensor_shapes(shape):
        if ".layers." not in name or "layernorm" in name:
            continue
        layer, square = int(name.split(".")[2]), source.read(name).float().square()
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if spec.name == "hidden":
            scores += square.sum(1 if residual else 0)
        elif spec.name == "intermediate" and ".mlp." in name:
            scores[layer] += square.sum(0 if residual else 1)
        elif spec.name == "group" and "self_attn" in name:
            scores[layer] += square.sum(0 if residual else 1).view(shape.num_query_groups, -1).sum(1)
        elif spec.name == "layer":
            scores[layer] += square.sum()
    return scores


def prune_by_magnitude(source: ModelFolder, target: ModelShape, folder: Path) -> None:
    """Write the model folder of the target shape that keeps the units of the largest norm."""
    specs = mask_specs(source.shape, target)
    keep = keep_sets({spec.name: unit_norms(source, spec) for spec in specs}, specs, source.shape)
    fold = Fold(source.shape, keep, Masks())
    with atomic_folder(folder) as temporary:
        with ShardedWriter.create(temporary, tensor_shapes(target), torch.float32) as writer:
            for name in tensor_shapes(source.shape):
                folded = fold(name, source.read(name).float())
                if folded is not None:
                    writer.write(*folded)
        write_settings(temporary, target, torch.float32, source.config, source.tokenizer_files)
        seal_folder(temporary, {})


def launch(arguments: list[str], log: Path, threads: int) -> None:
    """Run `megashear ARGUMENTS` to its end, its output in a file; raises CalledProcessError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as stream:
        command = [sys.executable, "-m", "megashear", *arguments]
        subprocess.run(command, check=True, stdout=stream, stderr=subprocess.STDOUT, env=environment)


def train(name: str, content: dict[str, Any], output: Path, threads: int) -> None:
    """Run one row's stages, its output in OUTPUT/NAME.log."""
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    launch(["run", str(path)], output / f"{name}.log", threads)


def source_losses(folder: Path, trial: Trial, dataset: str, output: Path, threads: int) -> dict[str, list[float]]:
    """Held-out losses of the source and their errors, by domain, on the sequences that the rows are judged by."""
    found = output / "source.json"
    if not found.exists():
        sizes = ["--sequence-length", str(trial.sequence_length), "--sequences", str(trial.eval_sequences)]
        launch(["eval", str(folder), dataset, *sizes, "--json", str(found)], output / "source.log", threads)
    return pairs(json.loads(found.read_text(encoding="utf-8")))


def pairs(record: dict[str, Any]) -> dict[str, list[float]]:
    """Losses and errors of a record, by domain."""
    return {domain: [record["losses"][domain], record["errors"][domain]] for domain in record["losses"]}


def final_losses(output: Path, name: str) -> dict[str, list[float]]:
    """Held-out losses and errors at the end of a row."""
    return pairs(json.loads((output / name / "pretrain" / "done.json").read_text(encoding="utf-8")))


def report(output: Path, trial: Trial, source: dict[str, list[float]], parameters: dict[str, int]) -> None:
    """Print the table, write `claim.json`, draw mean held-out loss over tokens after the source."""
    from megashear.train.tables import loss_table

    columns = {"source": source, **{name: final_losses(output, name) for name in ROWS}}
    print(loss_table({name: {d: (loss, error) for d, (loss, error) in c.items()} for name, c in columns.items()}))
    spread = {}
    for name in ROWS:
        excess = [columns[name][domain][0] - source[domain][0] for domain in source]
        mean = sum(excess) / len(excess)
        spread[name] = (sum((one - mean) ** 2 for one in excess) / len(excess)) ** 0.5
        print(f"{name:<10} {ROWS[name]:<42} mean excess {mean:.4f}, its spread over domains {spread[name]:.4f}")
    write_json(output / "claim.json", {"losses": columns, "spread": spread, "parameters": parameters})
    draw(output, trial)


def draw(output: Path, trial: Trial) -> None:
    """`claim.png`: mean held-out loss of each row against tokens after the source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    step_tokens = trial.global_batch * trial.sequence_length
    for name, meaning in ROWS.items():
        points, before = [], 0.0
        records = read_metrics(output / name / "metrics.jsonl")
        for stage in ("prune", "pretrain"):
            found = [r for r in records if r["stage"] == stage and r["kind"] == "eval"]
            points += [
                (before + r["step"] * step_tokens / 1e6, sum(r["loss"].values()) / len(r["loss"])) for r in found
            ]
            before = points[-1][0] if points else before
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=meaning)
    axes.set(xlabel="tokens after the source (million)", ylabel="held-out loss, mean over domains (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(output / "claim.png", dpi=150)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS, help="which comparison")
    parser.add_argument("dataset", help="dataset folder of tools/preprocess_data.py")
    parser.add_argument("output", type=Path, help="folder of the runs, the table and the picture")
    parser.add_argument("--source", type=Path, help="imported model to shear; needed where the trial trains none")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the steps of every stage")
    parser.add_argument("--seed", type=int, default=1, help="seed of all runs")
    parser.add_argument("--jobs", type=int, default=2, help="rows trained at a time")
    options = parser.parse_args()
    if (options.source is None) != (TRIALS[options.trial].source is not None):
        parser.error(f"trial {options.trial} trains its own source" if options.source else "--source is missing")
    return options


def main() -> None:
    """Train the source where the trial has one, run all rows, report."""
    options = arguments()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    trial = TRIALS[options.trial]
    steps = {name: max(1, round(getattr(trial, name) * options.steps)) for name in STEPS}
    trial = replace(trial, **steps)
    files = RunFiles(trial, options.dataset, output, options.seed)
    cores = len(os.sched_getaffinity(0))
    if trial.source is not None:
        train("source", files.source(), output, cores)
    folder = options.source or output / "source" / "final"
    source = ModelFolder.open(folder)
    losses = source_losses(folder, trial, options.dataset, output, cores)
    target = resolve_shape(ShapeConfig(**trial.target), source.shape)
    if not (output / "by_magnitude").exists():
        prune_by_magnitude(source, target, output / "by_magnitude")
    references = {domain: loss for domain, (loss, _) in losses.items()}
    threads = max(1, cores // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = {name: files.row(name, source.shape, folder, references) for name in ROWS}
        list(pool.map(lambda name: train(name, rows[name], output, threads), ROWS))
    report(output, trial, losses, {"source": source.shape.parameters(), "target": target.parameters()})


if __name__ == "__main__":
    main()
