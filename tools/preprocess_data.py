#!/usr/bin/env python
"""Make a dataset folder from shards of text: `python tools/preprocess_data.py INPUT... --tokenizer T --output FOLDER`.

Reads .jsonl, .jsonl.gz, .jsonl.zst and (with pyarrow) .parquet; writes a pair of Megatron files per domain and split,
and a manifest. A run that was killed goes on with the shards that are missing when it is started again. The work is
done by megashear/preprocess/build_dataset.py.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megashear.dataset.dataset_folder import check_domain_name
from megashear.errors import ConfigError, MegashearError
from megashear.preprocess.build_dataset import Preprocessing, preprocess, table
from megashear.preprocess.dataset_report import DomainReport
from megashear.preprocess.domains import DEFAULT_KEY, DomainRule, parse_domain_map
from megashear.preprocess.estimate import estimate, estimate_text
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging
from megashear.preprocess.tokenized_parts import PartSettings


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    made.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, quoted globs, or @FILE with one of these a line"
    )
    made.add_argument(
        "--tokenizer", required=True, type=Path, help="tokenizer.model, tokenizer.json, or a folder with one"
    )
    made.add_argument("--output", required=True, type=Path, help="dataset folder to make; must not exist")
    made.add_argument("--text-key", default="text", help="field of a line that holds the text (default: %(default)s)")
    made.add_argument("--domain", help="one domain for every line")
    made.add_argument(
        "--domain-key",
        default=DEFAULT_KEY,
        help="dotted field that names a line's domain (default: %(default)s); where a line has none, the shard's "
        "name before "
        "_00000, else its folder's name",
    )
    made.add_argument(
        "--domain-map",
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        help="rename domains by shell pattern; repeatable; or a JSON file {name: pattern or [patterns]}",
    )
    made.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    made.add_argument(
        "--heldout-fraction", type=float, default=0.005, help="share of documents held out (default: 0.005)"
    )
    made.add_argument(
        "--heldout-sequences",
        type=int,
        default=500,
        help="hold out at least so many sequences of a domain, where there is enough (default: 500)",
    )
    made.add_argument(
        "--heldout-limit",
        type=float,
        default=0.2,
        help="largest share of a domain's tokens held out to reach that number (default: 0.2)",
    )
    made.add_argument("--sequence-length", type=int, default=4096, help="tokens of such a sequence (default: 4096)")
    made.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        help="share of bad lines above which the run fails (default: 0.001)",
    )
    made.add_argument(
        "--drop-duplicates", action="store_true", help="leave out documents whose text stood earlier in the input"
    )
    made.add_argument(
        "--dry-run", action="store_true", help="estimate tokens, time and disk from a sample, and write nothing"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the documents' order (default: 0)")
    return made


def job_of(options: argparse.Namespace) -> Preprocessing:
    """The run that the options ask for; raises ConfigError with all that is wrong, DataError for a domain map."""
    limits: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
        ("workers", "at least 1", lambda v: v >= 1),
        ("heldout_fraction", "from 0 to below 1", lambda v: 0 <= v < 1),
        ("heldout_sequences", "at least 0", lambda v: v >= 0),
        ("heldout_limit", "from 0 to 1", lambda v: 0 <= v <= 1),
        ("sequence_length", "at least 1", lambda v: v >= 1),
        ("max_bad_fraction", "from 0 to 1", lambda v: 0 <= v <= 1),
    )
    problems = [
        f"--{name.replace('_', '-')} {value}: {wanted}"
        for name, wanted, fine in limits
        if not fine(value := getattr(options, name))
    ]
    if options.domain is not None and (problem := check_domain_name(options.domain)) is not None:
        problems.append(f"--domain {options.domain!r}: the name {problem}")
    if problems:
        raise ConfigError(problems)
    rule = DomainRule(options.domain, options.domain_key, parse_domain_map(options.domain_map))
    heldout = HeldOutRule(
        options.heldout_fraction, options.heldout_sequences, options.sequence_length, options.heldout_limit
    )
    return Preprocessing(
        inputs=options.inputs,
        tokenizer=options.tokenizer,
        output=options.output,
        merging=Merging(heldout, options.seed, options.drop_duplicates, draw),
        part=PartSettings(options.text_key, rule),
        max_bad_fraction=options.max_bad_fraction,
        workers=options.workers,
    )


def draw(reports: Sequence[DomainReport], folder: Path) -> None:
    """Add the picture of the lengths to a dataset folder."""
    from megashear.plots.length_plots import draw_lengths  # matplotlib: no worker process needs it
    from megashear.plots.plot_style import save

    save(draw_lengths(reports), folder / "report.png")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status of `megashear.errors`."""
    options = parser().parse_args(arguments)
    try:
        job = job_of(options)
        if options.dry_run:
            print(estimate_text(estimate(job), job.workers))
        else:
            print(table(preprocess(job), job.merging.heldout))
    except MegashearError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; the same command goes on from the finished shards", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
