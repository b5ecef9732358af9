#!/usr/bin/env python
"""Make a dataset folder of `.bin`/`.idx` pairs that Megatron's own tools made.

    python tools/adopt_data.py web=PREFIX code=PREFIX --tokenizer T --output FOLDER [--heldout web=PREFIX ...]

PREFIX is a pair's path without `.bin`/`.idx`. With held-out pairs for all domains, the pairs are taken as they are
(hard links, where the file system has them) and in their order: documents should have been shuffled. Without, documents
are held out by the hash of their token ids, shuffled, and written anew. Every document must end in the tokenizer's end
token (Megatron's `--append-eod`). The work is done by megashear/preprocess/adopt.py.
"""

import argparse
import sys
from pathlib import Path

from megashear.dataset.dataset_folder import check_domain_name
from megashear.dataset.tokenizer import load_tokenizer
from megashear.errors import ConfigError, MegashearError
from megashear.preprocess.adopt import adopt
from megashear.preprocess.build_dataset import refuse_output
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("pairs", nargs="+", metavar="NAME=PREFIX", help="a domain's pair")
    made.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer that made the pairs")
    made.add_argument("--output", type=Path, required=True, help="dataset folder to make; must not exist")
    made.add_argument(
        "--heldout", nargs="+", default=[], metavar="NAME=PREFIX", help="held-out pairs, for all domains or for none"
    )
    made.add_argument("--heldout-fraction", type=float, default=0.005, help="without them: share held out (0.005)")
    made.add_argument("--heldout-sequences", type=int, default=500, help="least sequences held out (500)")
    made.add_argument("--heldout-limit", type=float, default=0.2, help="largest share held out to reach them (0.2)")
    made.add_argument("--sequence-length", type=int, default=4096, help="tokens of such a sequence (4096)")
    made.add_argument("--seed", type=int, default=0, help="seed of the documents' order (0)")
    made.add_argument("--drop-duplicates", action="store_true", help="leave out equal documents but the first")
    return made


def named_prefixes(values: list[str], flag: str) -> dict[str, Path]:
    """{name: prefix} of NAME=PREFIX arguments; raises ConfigError."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not path:
            raise ConfigError(f"{flag} {value}: give NAME=PREFIX, the pair's path without .bin")
        if (problem := check_domain_name(name)) is not None:
            raise ConfigError(f"{flag} {value}: the domain name {name!r} {problem}")
        if name in found:
            raise ConfigError(f"{flag} {value}: the domain {name!r} is named twice; merge its pairs first")
        found[name] = Path(path.removesuffix(".bin").removesuffix(".idx"))
    return found


def run(options: argparse.Namespace) -> str:
    """Do what the options ask for; returns what to print. Raises MegashearError."""
    pairs, heldout = named_prefixes(options.pairs, "pair"), named_prefixes(options.heldout, "--heldout")
    if heldout and set(heldout) != set(pairs):
        raise ConfigError(f"--heldout names {sorted(heldout)}, the pairs {sorted(pairs)}; name all of them or none")
    if not 0 <= options.heldout_fraction < 1 or not 0 <= options.heldout_limit <= 1 or options.sequence_length < 1:
        raise ConfigError("--heldout-fraction and --heldout-limit are shares, --sequence-length is at least 1")
    refuse_output(options.output)
    rule = HeldOutRule(
        options.heldout_fraction, options.heldout_sequences, options.sequence_length, options.heldout_limit
    )
    merging = Merging(rule, options.seed, options.drop_duplicates)
    counts = adopt(options.output, pairs, heldout, load_tokenizer(options.tokenizer), merging)
    lines = [
        f"{name}: {split} {counted['tokens']:,} tokens in {counted['documents']:,} documents"
        for name, splits in counts.items()
        for split, counted in splits.items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status of `megashear.errors`."""
    try:
        print(run(parser().parse_args(arguments)))
    except MegashearError as error:
        print(f"adopt_data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
