#!/usr/bin/env python
"""Show a domain's documents, or a training sample, as text.

    python tools/inspect_data.py FOLDER                                the domains and what they hold
    python tools/inspect_data.py FOLDER DOMAIN --document 17           a document, from 0 on in the order of the file
    python tools/inspect_data.py FOLDER DOMAIN --sample 3 --sequence-length 2048
    python tools/inspect_data.py FOLDER DOMAIN --document 0 --split heldout --tokens

A sample is what training reads: sequence length + 1 consecutive tokens, with the ends of documents shown as ⏹.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from megashear.dataset.dataset_folder import SPLITS, Dataset
from megashear.dataset.samples import sample_count
from megashear.errors import ConfigError, MegashearError

END = "⏹\n"  # where a document ends


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="dataset folder, made by tools/preprocess_data.py")
    made.add_argument("domain", nargs="?", help="name of a domain; without one, all are listed")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="show document N")
    what.add_argument("--sample", type=int, metavar="N", help="show training sample N of the domain's stream")
    made.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="which side (default: train)")
    made.add_argument("--sequence-length", type=int, default=4096, help="of samples (default: 4096)")
    made.add_argument("--tokens", action="store_true", help="print ids instead of text")
    return made


def listing(dataset: Dataset) -> str:
    """One line a domain and split."""
    lines = []
    for domain, splits in dataset.counts.items():
        for split, counted in splits.items():
            lines.append(f"{domain}: {split} {counted['documents']:,} documents, {counted['tokens']:,} tokens")
    return "\n".join(lines)


def chosen(dataset: Dataset, options: argparse.Namespace) -> np.ndarray:
    """Ids of what the options ask for; raises ConfigError where it is not there."""
    pair = dataset.pair(options.domain, options.split)
    if options.sample is not None:
        if options.sequence_length < 1:
            raise ConfigError("--sequence-length is at least 1")
        count = sample_count(len(pair.tokens), options.sequence_length)
        check_number("--sample", options.sample, count)
        start = options.sample * options.sequence_length
        ids: np.ndarray = pair.tokens[start : start + options.sequence_length + 1]
        return ids
    number = options.document or 0
    check_number("--document", number, pair.documents)
    return pair.document(number)


def check_number(flag: str, number: int, count: int) -> None:
    """Raise ConfigError where a number is not in 0..count-1."""
    if not 0 <= number < count:
        raise ConfigError(f"{flag} {number}: there are {count}, numbered from 0")


def as_text(dataset: Dataset, ids: np.ndarray) -> str:
    """Ids as text, the end tokens shown."""
    tokenizer, pieces, start = dataset.tokenizer(), [], 0
    for end in [*np.flatnonzero(ids == dataset.eos_id).tolist(), len(ids)]:
        pieces.append(tokenizer.decode(ids[start:end]))
        start = end + 1
    return END.join(pieces)


def run(options: argparse.Namespace) -> str:
    """What to print; raises MegashearError."""
    dataset = Dataset.open(options.folder)
    if options.domain is None:
        return listing(dataset)
    if options.domain not in dataset.domains:
        raise ConfigError(f"no domain {options.domain!r}; there are {', '.join(dataset.domains)}")
    ids = chosen(dataset, options)
    return " ".join(map(str, ids.tolist())) if options.tokens else as_text(dataset, ids)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status of `megashear.errors`."""
    try:
        text = run(parser().parse_args(arguments))
    except MegashearError as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.write(text.encode("utf-8", "replace").decode("utf-8") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
