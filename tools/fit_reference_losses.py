#!/usr/bin/env python
"""Fit a scaling law per domain and read off reference losses at a size, for `mixture.references: scaling_law`.

`python tools/fit_reference_losses.py LOSSES --parameters 1345423360 --output references.json`. LOSSES is JSON,
`{"6738415616": {"web": 1.75, ...}, ...}`, or CSV with the header `parameters,web,...` and a row per size: held-out
losses in nats per token of three models or more of one family. The work is done by megashear/mixture/scaling_law.py.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from megashear.errors import DataError, MegashearError
from megashear.files.atomic import write_json
from megashear.mixture.scaling_law import ScalingLaw, fit_domains


def read_losses(path: Path) -> dict[int, dict[str, float]]:
    """{parameters: {domain: loss}} of a JSON or CSV file; raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = rows_of_csv(text) if path.suffix == ".csv" else json.loads(text)
        losses = {int(size): {str(name): float(loss) for name, loss in row.items()} for size, row in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not a table of losses ({error}); give JSON {{parameters: {{domain: loss}}}}, or CSV "
            "with the header parameters,domain,..."
        ) from error
    if not losses or not all(losses.values()):
        raise DataError(f"{path}: holds no losses; give a row of losses per model size")
    return losses


def rows_of_csv(text: str) -> dict[str, dict[str, str]]:
    """{parameters: {domain: loss}} of a CSV table, still text; ValueError for a size given twice or a ragged row."""
    content: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(text.splitlines(), skipinitialspace=True):
        size = row.pop("parameters")
        if size in content or None in row or None in row.values():
            raise ValueError(f"the row of size {size} is ragged or there twice")
        content[size] = row
    return content


def report(laws: dict[str, ScalingLaw], parameters: int) -> dict[str, Any]:
    """The content of the output file: references at `parameters`, and each domain's law with what speaks against it."""
    described = {
        name: {
            "amplitude": law.amplitude,
            "exponent": law.exponent,
            "limit": law.limit,
            "residual": law.residual,
            "problems": law.problems(),
        }
        for name, law in laws.items()
    }
    references = {name: round(law.loss(parameters), 6) for name, law in laws.items()}
    return {"parameters": parameters, "references": references, "laws": described}


def table(content: dict[str, Any]) -> str:
    """The report as text."""
    width = max(len("domain"), *(len(name) for name in content["laws"]))
    lines = [f"{'domain':{width}}  {'reference':>9}  {'A':>10}  {'alpha':>7}  {'E':>8}  {'residual':>9}"]
    for name, law in content["laws"].items():
        lines.append(
            f"{name:{width}}  {content['references'][name]:9.4f}  {law['amplitude']:10.4g}  {law['exponent']:7.4f}  "
            f"{law['limit']:8.4f}  {law['residual']:9.2e}" + "".join(f"  ! {problem}" for problem in law["problems"])
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status of `megashear.errors`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("losses", type=Path, help="JSON or CSV: held-out losses by model size and domain")
    parser.add_argument("--parameters", type=int, required=True, help="size to read at, embeddings included")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.parameters < 1:
        parser.error(f"--parameters {options.parameters}: at least 1")
    try:
        content = report(fit_domains(read_losses(options.losses)), options.parameters)
        write_json(options.output, content)
    except MegashearError as error:
        print(f"fit_reference_losses: {error}", file=sys.stderr)
        return error.exit_code
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
