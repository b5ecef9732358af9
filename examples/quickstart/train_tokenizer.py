#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on shards of text: `python train_tokenizer.py SHARDS FOLDER VOCABULARY`.

Of Llama 3's kind, small; the folder is a tokenizer that transformers loads. Read next: tools/preprocess_data.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megashear.errors import MegashearError
from megashear.files.atomic import atomic_folder, write_json

END = "<|end|>"
CHARACTERS = 1_500_000
"""Characters of each shard that are read."""
WORDS = r"[^\r\n\w]?\p{L}+|\p{N}|_+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What a token may span: a word with the sign before it, one digit, a run of signs, ends of lines, blanks."""


def main() -> int:
    """Write FOLDER; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("shards", type=Path, help="folder of .jsonl shards")
    parser.add_argument("folder", type=Path, help="folder of the tokenizer to make")
    parser.add_argument("vocabulary", type=int, help="number of tokens")
    options = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(options.shards), trainer)
    try:
        with atomic_folder(options.folder) as folder:
            tokenizer.save(str(folder / "tokenizer.json"))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
            write_json(folder / "tokenizer_config.json", settings)
    except MegashearError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{tokenizer.get_vocab_size()} tokens")
    return 0


def texts(shards: Path) -> Iterator[str]:
    """The first texts of every shard."""
    for path in sorted(shards.glob("*.jsonl")):
        size = 0
        with path.open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                size += len(text)
                if size > CHARACTERS:
                    break
                yield text


if __name__ == "__main__":
    sys.exit(main())
