#!/usr/bin/env python
"""Put the quick start's results together: `python summarise.py FOLDER`.

FOLDER holds the runs `sheared` and `scratch` (the same shape from random weights at as many tokens) and `seconds.txt`,
a line `STEP SECONDS` for each step done. Writes FOLDER/summary.json and prints it as tables.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megashear.errors import DataError, MegashearError
from megashear.evaluation.losses import loss_table
from megashear.files.atomic import write_json
from megashear.planning.text_table import table

COLUMNS = ("source", "pruned", "final", "scratch")


def main() -> int:
    """Write the summary; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of the quick start")
    folder = parser.parse_args().folder
    try:
        summary = summarise(folder)
        write_json(folder / "summary.json", summary)
    except MegashearError as error:
        print(f"summarise: {error}", file=sys.stderr)
        return error.exit_code
    print(render(summary))
    return 0


def summarise(folder: Path) -> dict[str, Any]:
    """Losses by model and domain, with standard errors; parameters, tokens, seconds and the export's folder."""
    source, sheared, scratch = (read(folder / name / "summary.json") for name in ("source", "sheared", "scratch"))
    losses = sheared["losses"] | {"scratch": scratch["losses"]["final"]}
    errors = sheared["errors"] | {"scratch": scratch["errors"]["final"]}
    if sheared["parameters"]["final"] != scratch["parameters"]["final"]:
        raise DataError(f"{folder}/scratch: not of the sheared model's shape; make their run files agree")
    shearing = sum(sheared["tokens"].values())
    if shearing != scratch["tokens"]["pretrain"]:
        raise DataError(f"{folder}/scratch: not of the sheared model's {shearing:,} tokens; make their run files agree")
    return {
        "losses": {name: losses[name] for name in COLUMNS},
        "errors": {name: errors[name] for name in COLUMNS},
        "parameters": sheared["parameters"],
        "tokens": {"source": source["tokens"]["pretrain"], **sheared["tokens"], "scratch": shearing},
        "seconds": seconds(folder / "seconds.txt", sheared["seconds"]),
        "export": sheared["export"],
    }


def read(path: Path) -> dict[str, Any]:
    """A run's summary; DataError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; remove the folder and run the quick start again") from error


def seconds(path: Path, phases: dict[str, float]) -> dict[str, float]:
    """Wall time of every step, its processes' start included; `shear` falls into its training phases and the rest."""
    steps: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, took = line.split()
        steps[name] = steps.get(name, 0.0) + float(took)
    rest = {"start, finalize, export": max(0.0, steps.pop("shear", 0.0) - sum(phases.values()))}
    total = sum(steps.values()) + sum(phases.values()) + sum(rest.values())
    ordered = {name: steps[name] for name in steps if name != "scratch"} | phases | rest
    ordered |= {name: steps[name] for name in steps if name == "scratch"}
    return {name: round(took, 1) for name, took in (ordered | {"all": total}).items()}


def render(summary: dict[str, Any]) -> str:
    """The summary as tables."""
    losses = {
        name: {domain: (loss, summary["errors"][name][domain]) for domain, loss in column.items()}
        for name, column in summary["losses"].items()
    }
    rows = [[f"parameters, {name}", f"{number:,}"] for name, number in summary["parameters"].items()]
    rows += [[f"tokens, {name}", f"{number:,}"] for name, number in summary["tokens"].items()]
    rows += [[f"seconds, {name}", f"{took:.0f}"] for name, took in summary["seconds"].items()]
    return "\n\n".join([loss_table(losses), table("Run", ["", ""], rows)])


if __name__ == "__main__":
    sys.exit(main())
