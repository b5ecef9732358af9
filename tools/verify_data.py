#!/usr/bin/env python
"""Compare a dataset folder with all that its manifest promises: `python tools/verify_data.py FOLDER [--sample 0.01]`.

Reads every byte, or with --sample a share of the blocks and documents, chosen anew by --seed. Tells all that is wrong,
one line each, and ends with status 3 then. The work is done by megashear/dataset/verify_dataset.py.
"""

import argparse
import os
import sys
from pathlib import Path

from megashear.dataset.verify_dataset import verify_dataset
from megashear.errors import ConfigError, DataError, MegashearError


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status of `megashear.errors`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="dataset folder, made by tools/preprocess_data.py")
    parser.add_argument("--sample", type=float, default=1.0, metavar="FRACTION", help="share looked at (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="threads (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.sample <= 1 or options.workers < 1:
            raise ConfigError("--sample is above 0 and at most 1, --workers at least 1")
        findings = verify_dataset(options.folder, options.sample, options.seed, options.workers)
    except MegashearError as error:
        print(f"verify_data: {error}", file=sys.stderr)
        return error.exit_code
    for line in findings.checked:
        print(f"holds: {line}")
    for line in findings.problems:
        print(f"verify_data: {line}", file=sys.stderr)
    return DataError.exit_code if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
