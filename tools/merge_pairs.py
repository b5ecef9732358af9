#!/usr/bin/env python
"""Put Megatron pairs together, or cut one apart, without loading their indices.

    python tools/merge_pairs.py TARGET PREFIX PREFIX ...
    python tools/merge_pairs.py TARGET PREFIX --cut 100000        TARGET.0, TARGET.1, ... of 100000 documents each

Paths are without `.bin`/`.idx`. Documents keep their order. tools/adopt_data.py makes a dataset folder of pairs. The
work is done by megashear/dataset/join_pairs.py.
"""

import argparse
import sys
from pathlib import Path

from megashear.dataset.indexed import IndexedTokens, pair
from megashear.dataset.join_pairs import merge_pairs, split_pair
from megashear.errors import ConfigError, DataError, MegashearError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("target", type=Path, help="path of the new pair; it must not exist")
    made.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX", help="pairs to put together, or one to cut")
    made.add_argument("--cut", type=int, metavar="DOCUMENTS", help="cut into pairs of so many documents")
    return made


def run(options: argparse.Namespace) -> list[IndexedTokens]:
    """Do what the options ask for; returns the new pairs. Raises MegashearError."""
    targets = [options.target]
    if options.cut is not None:
        if options.cut < 1 or len(options.prefixes) != 1:
            raise ConfigError("--cut is at least 1, and cuts one pair")
        documents = IndexedTokens(options.prefixes[0]).documents
        ends = [*range(options.cut, documents, options.cut), documents]
        targets = [options.target.with_name(f"{options.target.name}.{number}") for number in range(len(ends))]
    there = next((path for target in targets for path in pair(target) if path.exists()), None)
    if there is not None:
        raise DataError(f"{there}: already there; remove it or give another target")
    if options.cut is not None:
        return split_pair(options.prefixes[0], targets, ends)
    return [merge_pairs(options.target, options.prefixes)]


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status of `megashear.errors`."""
    try:
        made = run(parser().parse_args(arguments))
    except MegashearError as error:
        print(f"merge_pairs: {error}", file=sys.stderr)
        return error.exit_code
    for one in made:
        print(f"{one.bin_path}: {one.documents:,} documents, {len(one.tokens):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
