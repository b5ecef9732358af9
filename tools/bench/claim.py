"""The paper's claim at a size that two cores carry: does shearing beat training the same shape from scratch on equal
tokens?

A source LLaMA is trained on a dataset, sheared to half its parameters outside the embedding with a tenth of the
source's tokens, and continued with three tenths. Rows: the same with a static mixture; the same shape from scratch;
units kept by magnitude (no learned masks) and continued. All rows see equal tokens after the source. Prints the
table, writes `claim.json` and `claim.png`.

    python tools/bench/claim.py DATASET OUTPUT [--source-steps 1500] [--seed 1] [--jobs 2]

Runs are ordinary `megashear run`s below OUTPUT: interrupted, the same command goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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

SOURCE: dict[str, Any] = {
    "hidden_size": 320,
    "num_layers": 8,
    "num_heads": 10,
    "num_query_groups": 10,
    "head_dim": 32,
    "intermediate_size": 864,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
TARGET: dict[str, Any] = {
    "hidden_size": 256,
    "num_layers": 8,
    "num_heads": 8,
    "num_query_groups": 8,
    "intermediate_size": 480,
}
ROWS = {
    "sheared": "learned masks, dynamic mixture",
    "static": "learned masks, static mixture",
    "magnitude": "units by magnitude, dynamic mixture",
    "scratch": "same shape from scratch, static mixture",
}


def run_files(dataset: str, output: Path, steps: int, seed: int) -> dict[str, dict[str, Any]]:
    """The run files of all rows, by name."""
    prune, go_on = steps // 10, 3 * steps // 10

    def batch(count: int, evaluations: int) -> dict:
        interval = max(1, count // evaluations)
        return {"steps": count, "global_batch": 8, "micro_batch": 8, "eval_interval": interval, "eval_sequences": 64}

    def run(name: str, **sections: Any) -> dict[str, Any]:
        common = {"data": {"folder": dataset, "sequence_length": 256}, "precision": "bf16"}
        stages = sections.pop("stages")
        return {"run": {"folder": str(output / name), "stages": stages, "seed": seed}, **common, **sections}

    rate = {"learning_rate": 1.2e-3, "weight_decay": 0.1}
    go_on_rate = {"learning_rate": 6e-4, "weight_decay": 0.1}
    pruning = {
        "batch": batch(prune, 5),
        "optimizer": {"learning_rate": 3e-4},
        "mask_learning_rate": 0.5,
        "lambda_learning_rate": 2.0,
        "sparsity_warmup_steps": prune // 2,
    }
    source = {"folder": str(output / "source" / "final")}
    dynamic = {"rule": "paper", "references": "source"}
    continued = {"batch": batch(go_on, 6), "optimizer": go_on_rate}
    shear: dict[str, Any] = {"source": source, "target": TARGET, "prune": pruning, "pretrain": continued}
    three = ["prune", "finalize", "pretrain"]
    scratch = {"batch": batch(prune + go_on, 8), "optimizer": rate}
    small = {"shape": SOURCE | TARGET}
    return {
        "source": run("source", stages=["pretrain"], source={"shape": SOURCE}, mixture={"rule": "static"})
        | {"pretrain": {"batch": batch(steps, 5), "optimizer": rate}},
        "sheared": run("sheared", stages=three, mixture=dynamic, **shear),
        "static": run("static", stages=three, mixture={"rule": "static"}, **shear),
        "magnitude": run(
            "magnitude",
            stages=["pretrain"],
            source={"folder": str(output / "by_magnitude")},
            mixture={"rule": "paper", "references": "list"},
            pretrain={"batch": batch(prune + go_on, 8), "optimizer": go_on_rate},
        ),
        "scratch": run("scratch", stages=["pretrain"], source=small, mixture={"rule": "static"}, pretrain=scratch),
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


def launch(name: str, content: dict, output: Path, threads: int) -> None:
    """Run one row to its end, its output in OUTPUT/NAME.log; raises CalledProcessError where it fails."""
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(output / f"{name}.log", "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "megashear", "run", str(path)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)


def last_losses(output: Path, name: str) -> dict[str, tuple[float, float]]:
    """Held-out losses and errors at the end of a row."""
    record = json.loads((output / name / "pretrain" / "done.json").read_text(encoding="utf-8"))
    return {domain: (record["losses"][domain], record["errors"][domain]) for domain in record["losses"]}


def report(output: Path, parameters: dict[str, int]) -> None:
    """Print the table, write `claim.json`, draw mean held-out loss over tokens after the source."""
    from megashear.train.tables import loss_table

    columns = {name: last_losses(output, name) for name in ["source", *ROWS]}
    print(loss_table(columns))
    references = {domain: pair[0] for domain, pair in columns["source"].items()}
    spread = {}
    for name in ROWS:
        excess = [columns[name][domain][0] - references[domain] for domain in references]
        mean = sum(excess) / len(excess)
        spread[name] = (sum((one - mean) ** 2 for one in excess) / len(excess)) ** 0.5
        print(f"{name:<10} {ROWS[name]:<42} mean excess {mean:.4f}, its spread over domains {spread[name]:.4f}")
    write_json(output / "claim.json", {"losses": columns, "spread": spread, "parameters": parameters})
    draw(output)


def draw(output: Path) -> None:
    """`claim.png`: mean held-out loss of each row against tokens after the source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, meaning in ROWS.items():
        points, before = [], 0.0
        records = read_metrics(output / name / "metrics.jsonl")
        for stage in ("prune", "pretrain"):
            found = [r for r in records if r["stage"] == stage and r["kind"] == "eval"]
            points += [(before + r["step"] * 8 * 256 / 1e6, sum(r["loss"].values()) / len(r["loss"])) for r in found]
            before = points[-1][0] if points else before
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=meaning)
    axes.set(xlabel="tokens after the source (million)", ylabel="held-out loss, mean over domains (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(output / "claim.png", dpi=150)


def main() -> None:
    """Run all rows and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="dataset folder of tools/preprocess_data.py")
    parser.add_argument("output", type=Path, help="folder of the runs, the table and the picture")
    parser.add_argument("--source-steps", type=int, default=1500, help="steps of 2048 tokens for the source")
    parser.add_argument("--seed", type=int, default=1, help="seed of all runs")
    parser.add_argument("--jobs", type=int, default=2, help="rows trained at a time")
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    files = run_files(options.dataset, output, options.source_steps, options.seed)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    launch("source", files["source"], output, threads)
    source = ModelFolder.open(output / "source" / "final")
    target = resolve_shape(ShapeConfig(**TARGET), source.shape)
    if not (output / "by_magnitude").exists():
        prune_by_magnitude(source, target, output / "by_magnitude")
    files["magnitude"]["mixture"]["reference_losses"] = {
        d: loss for d, (loss, _) in last_losses(output, "source").items()
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: launch(name, files[name], output, threads), ROWS))
    report(output, {"source": source.shape.parameters(), "target": target.parameters()})


if __name__ == "__main__":
    main()
