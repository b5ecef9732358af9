"""What a budget of tokens buys: shearing against one-shot pruning and against training the same shape from scratch.

A source LLaMA is brought to the target's shape in several ways and continued, at several budgets: pruning takes a share
of the source's tokens, continuing three times that. All rows see equal tokens after the source; rows that prune in one
shot spend pruning's on continuing. Prints the tables, writes `claim.json` and `claim.png`.

    python tools/bench/claim.py 10m DATASET OUTPUT
    python tools/bench/claim.py 10m DATASET OUTPUT --budgets 0.02 --seeds 1,2,3 --rows learned,taylor
    python tools/bench/claim.py 50m DATASET OUTPUT --source IMPORTED_SMOLLM2

`10m` trains its source first, 10 million parameters outside the embedding, unless `--source` gives one. `50m` takes
SmolLM2-135M, whose tokenizer the dataset must have; its budgets are in steps. Runs are ordinary `megashear run`s below
OUTPUT: interrupted, the same command goes on; with another source or other steps it is refused there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megashear.config.model_shape import ModelShape
from megashear.config.presets import resolve_shape
from megashear.config.resolve import WEIGHT
from megashear.config.schema import ShapeConfig
from megashear.files.atomic import write_json
from megashear.hf.model_folder import ModelFolder
from megashear.planning.text_table import table
from megashear.report.run_cost import costs, trained_tokens
from megashear.report.run_record import read_run


@dataclass(frozen=True)
class Trial:
    """Shapes, steps and rates of one comparison; a step is `global_batch` sequences."""

    target: dict[str, Any]
    source_steps: int
    """Steps that the source is trained, or that budgets are shares of."""
    rate: float
    """Peak learning rate from random weights; pruning and continuing take the default one."""
    source: dict[str, Any] | None = None
    """Shape to train first; None: a pre-trained model is given."""
    budgets: tuple[float, ...] = (0.02, 0.1, 0.3)
    global_batch: int = 8
    micro_batch: int = 8
    sequence_length: int = 256
    eval_interval: int = 100
    """Steps between evaluations where the mixture follows them; other rows are evaluated at the end alone."""
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
        source_steps=1000,
        rate=1.2e-3,
        budgets=(0.03,),
        global_batch=4,
        micro_batch=4,
        eval_interval=30,
        eval_sequences=16,
    ),
}
UNTAUGHT = {"distillation": {"weight": 0.0}}
ROWS: dict[str, str] = {
    "scratch": "same shape from scratch",
    "magnitude": "one shot by magnitude",
    "taylor": "one shot by first-order Taylor on masks",
    "minitron": "one shot by activations (Minitron)",
    "directions": "one shot by Taylor, of principal directions",
    "one_shot": "one shot, defaults but no teacher",
    "one_shot_taught": "one shot, defaults",
    "published": "learned masks, published rates",
    "learned": "learned masks, defaults",
    "dynamic": "the same, on a dynamic mixture",
    "untaught": "learned masks, defaults but no teacher",
    "taught": "learned masks, defaults, the teacher until it is outgrown",
    "distilled": "learned masks, defaults, the teacher to the end",
}
ONE_SHOT: dict[str, dict[str, Any]] = {
    "magnitude": {"basis": "source", "refit": 0, "importance": {"criterion": "magnitude"}},
    "taylor": {"basis": "source", "refit": 0, "importance": {"criterion": "taylor_mask"}},
    "minitron": {"basis": "source", "refit": 0, "importance": {"criterion": "activation"}},
    "directions": {"refit": 0, "importance": {"criterion": "taylor_mask"}},
    "one_shot": {},
    "one_shot_taught": {},
}
"""Rows of published criteria choose among the source's own units and leave the weights of what stays, as published;
none of them has a teacher.
"""


@dataclass(frozen=True)
class Case:
    """One run of the comparison."""

    row: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder below OUTPUT."""
        return f"budget-{self.budget:g}/seed-{self.seed}/{self.row}"


class RunFiles:
    """The run files of a trial: one `megashear run` for the source and for each case."""

    def __init__(self, trial: Trial, dataset: str, output: Path, precision: str) -> None:
        self.trial, self.dataset, self.output, self.precision = trial, dataset, output, precision

    def source(self) -> dict[str, Any]:
        """The source's own training."""
        trial = self.trial
        return self._run("source", 1, {"shape": trial.source}, pretrain=self._phase(trial.source_steps, trial.rate))

    def case(self, case: Case, source: ModelShape, folder: Path) -> dict[str, Any]:
        """The run of one row at one budget and seed."""
        trial = self.trial
        prune_steps = max(1, round(trial.source_steps * case.budget))
        continued = 3 * prune_steps
        if case.row == "scratch":
            shape = resolve_shape(ShapeConfig(**trial.target), source)
            keys = ShapeConfig.__dataclass_fields__.keys() & vars(shape).keys()
            small = {key: getattr(shape, key) for key in keys - {"rope_scaling"}}
            pretrain = self._phase(prune_steps + continued, trial.rate)
            return self._run(case.name, case.seed, {"shape": small}, pretrain=pretrain)
        prune, pretrain = self._phase(prune_steps), self._phase(continued)
        if case.row in ONE_SHOT:
            prune |= {"method": "one_shot", **ONE_SHOT[case.row]}
            pretrain = self._phase(prune_steps + continued)
            pretrain |= {} if case.row == "one_shot_taught" else UNTAUGHT
        elif case.row == "published":
            prune |= {"preset": "paper", "sparsity_warmup_steps": prune_steps // 5}
            prune["optimizer"] = {"warmup_steps": prune_steps // 10}
        elif case.row == "untaught":
            prune |= UNTAUGHT
        elif case.row == "taught":
            prune |= {"distillation": {"weight": WEIGHT}}
        elif case.row == "distilled":
            prune |= {"distillation": {"weight": WEIGHT, "stop_when": "end"}}
            pretrain |= {"distillation": {"stop_when": "end"}}
        if case.row == "dynamic":
            for phase in (prune, pretrain):
                phase["batch"]["eval_interval"] = min(phase["batch"]["steps"], trial.eval_interval)
        sections = {"prune": prune, "pretrain": pretrain, "target": trial.target}
        rule = "paper" if case.row == "dynamic" else "static"
        return self._run(case.name, case.seed, {"folder": str(folder)}, rule, **sections)

    def _phase(self, steps: int, rate: float | None = None) -> dict[str, Any]:
        trial = self.trial
        batch = {
            "steps": steps,
            "global_batch": trial.global_batch,
            "micro_batch": trial.micro_batch,
            "eval_interval": steps,
            "eval_sequences": trial.eval_sequences,
        }
        return {"batch": batch, "optimizer": {"learning_rate": rate, "weight_decay": 0.1}}

    def _run(
        self, name: str, seed: int, source: dict[str, Any], rule: str = "static", **sections: Any
    ) -> dict[str, Any]:
        phases = ["prune", "finalize", "pretrain"] if "prune" in sections else ["pretrain"]
        return {
            "run": {"folder": str(self.output / name), "phases": phases, "seed": seed},
            "source": source,
            "data": {"folder": self.dataset, "sequence_length": self.trial.sequence_length},
            "mixture": {"rule": rule},
            "precision": self.precision,
            "checkpoint": {"interval": 500, "keep": 1},
            **sections,
        }


def launch(arguments: list[str], log: Path, threads: int) -> None:
    """Run `megashear ARGUMENTS` to its end, its output in a file; ends with that file's last line where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as stream:
        command = [sys.executable, "-m", "megashear", *arguments]
        done = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise SystemExit(f"megashear {' '.join(arguments)}: exit code {done.returncode}; {log} ends with: {last}")


def train(name: str, content: dict[str, Any], output: Path, threads: int) -> None:
    """Run one case's phases, its output in OUTPUT/NAME.log; a finished run does nothing but compare its keys."""
    before = (output / name / "pretrain" / "done.json").exists()
    path = output / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    launch(["run", str(path)], output / f"{name}.log", threads)
    if not before:
        print(f"{name}: mean held-out loss {mean(record(output / name, 'pretrain')):.4f}", flush=True)


def record(run: Path, phase: str) -> dict[str, float]:
    """Held-out losses by domain at the end of a phase."""
    losses: dict[str, float] = json.loads((run / phase / "done.json").read_text(encoding="utf-8"))["losses"]
    return losses


def source_losses(folder: Path, trial: Trial, dataset: str, output: Path, threads: int) -> dict[str, float]:
    """Held-out losses of the source by domain, on the sequences that the rows are judged by."""
    found = output / "source.json"
    sizes = ["--sequence-length", str(trial.sequence_length), "--sequences", str(trial.eval_sequences)]
    launch(["eval", str(folder), dataset, *sizes, "--json", str(found)], output / "source.log", threads)
    losses: dict[str, float] = json.loads(found.read_text(encoding="utf-8"))["losses"]
    return losses


def mean(values: dict[str, float]) -> float:
    """Mean over domains."""
    return statistics.fmean(values.values())


def spread(values: dict[str, float], source: dict[str, float]) -> float:
    """Standard deviation over domains of loss - the source's."""
    return statistics.pstdev(values[domain] - source[domain] for domain in source)


MEANS = ("spread", "tokens", "flops")


def summarise(cases: list[Case], output: Path, source: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Per budget and row, means over seeds: loss and its standard error, its spread over domains, tokens, FLOPs."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        run = output / case.name
        losses, spent = record(run, "pretrain"), costs(read_run(run))
        one = found.setdefault(f"{case.budget:g}", {}).setdefault(case.row, {"seeds": {}} | {key: [] for key in MEANS})
        one["seeds"][case.seed] = losses
        one["spread"].append(spread(losses, source))
        one["tokens"].append(trained_tokens(spent))
        one["flops"].append(sum(cost.flops + cost.teacher_flops for cost in spent))
    for rows in found.values():
        for one in rows.values():
            means = [mean(losses) for losses in one["seeds"].values()]
            one["loss"] = statistics.fmean(means)
            one["error"] = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
            one |= {key: statistics.fmean(one[key]) for key in MEANS}
    return found


def report(found: dict[str, dict[str, Any]], source: dict[str, float]) -> str:
    """One table for each budget."""
    parts = [f"source: mean held-out loss {mean(source):.4f}"]
    header = ["", "mean loss", "- source's", "spread over domains", "tokens", "FLOPs"]
    for budget, rows in found.items():
        lines = []
        for name, one in sorted(rows.items(), key=lambda item: item[1]["loss"]):
            error = "" if one["error"] is None else f" +- {one['error']:.4f}"
            sizes = [f"{one['tokens']:.3g}", f"{one['flops']:.3g}"]
            excess = f"{one['loss'] - mean(source):+.4f}"
            lines.append([ROWS[name], f"{one['loss']:.4f}{error}", excess, f"{one['spread']:.3f}", *sizes])
        seeds = len(next(iter(rows.values()))["seeds"])
        parts.append(table(f"Pruning on {float(budget):.0%} of the source's tokens ({seeds} seeds)", header, lines))
    return "\n\n".join(parts)


def draw(found: dict[str, dict[str, Any]], source: dict[str, float], path: Path) -> None:
    """Mean loss of each row against the budget, with its error over seeds; below, how far sheared rows are from the
    best at each budget.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, (name, meaning) in enumerate(ROWS.items()):
        points = [(float(budget), rows) for budget, rows in found.items() if name in rows]
        shares = [100 * budget for budget, _ in points]
        losses, errors = [r[name]["loss"] for _, r in points], [r[name]["error"] or 0.0 for _, r in points]
        best = [min(one["loss"] for one in rows.values()) for _, rows in points]
        style: dict[str, Any] = {
            "marker": "o",
            "markersize": 3,
            "capsize": 2,
            "color": "black" if name == "learned" else f"C{number}",
            "linewidth": 2.0 if name == "learned" else 1.2,
            "zorder": 3 if name == "learned" else 2,
            "linestyle": "-" if number < 10 else "--",
        }
        if points:
            upper.errorbar(shares, losses, errors, label=meaning, **style)
        if points and name != "scratch":
            lower.errorbar(shares, [x - y for x, y in zip(losses, best, strict=True)], errors, **style)
    upper.axhline(mean(source), color="grey", linestyle=":", label="source")
    lower.set(xscale="log", xlabel="pruning tokens (% of the source's); continuing: three times as many")
    lower.set_xticks([100 * float(budget) for budget in found], [f"{100 * float(budget):g}" for budget in found])
    lower.minorticks_off()
    upper.set_ylabel("mean held-out loss (nats per token)")
    lower.set_ylabel("above the lowest row (nats per token)")
    figure.legend(loc="outside lower center", frameon=False, fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of values between commas."""
    return lambda text: [kind(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS, help="which comparison")
    parser.add_argument("dataset", help="dataset folder of tools/preprocess_data.py")
    parser.add_argument("output", type=Path, help="folder of the runs, the tables and the picture")
    parser.add_argument("--source", type=Path, help="model to shear; needed where the trial trains none")
    parser.add_argument("--budgets", type=listed(float), help="pruning tokens as shares of the source's")
    parser.add_argument("--seeds", type=listed(int), default=[1, 2, 3], help="seeds of the runs (default: 1,2,3)")
    parser.add_argument("--rows", type=listed(str), default=list(ROWS), help=f"of: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--source-steps", type=int, help="steps of the source's training, which budgets are shares of")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of all runs; fp32 is the faster one on CPUs without products in bf16 (default: bf16)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    options = parser.parse_args()
    if options.source is None and TRIALS[options.trial].source is None:
        parser.error(f"trial {options.trial} trains no source: give --source")
    unknown = set(options.rows) - ROWS.keys()
    if unknown:
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Train the source where it is not given, run all cases, report."""
    options = arguments()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    trial = TRIALS[options.trial]
    trial = replace(trial, source_steps=options.source_steps or trial.source_steps)
    files = RunFiles(trial, options.dataset, output, options.precision)
    cores = len(os.sched_getaffinity(0))
    if options.source is None:
        train("source", files.source(), output, cores)
    folder = options.source or output / "source" / "final"
    source = ModelFolder.open(folder).shape
    losses = source_losses(folder, trial, options.dataset, output, cores)
    cases = [
        Case(row, budget, seed)
        for budget in options.budgets or trial.budgets
        for seed in options.seeds
        for row in ROWS
        if row in options.rows
    ]
    threads = max(1, cores // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda case: train(case.name, files.case(case, source, folder), output, threads), cases))
    found = summarise(cases, output, losses)
    print(report(found, losses))
    write_json(output / "claim.json", {"source": losses, "budgets": found, "parameters": source.parameters()})
    draw(found, losses, output / "claim.png")


if __name__ == "__main__":
    main()
