#!/usr/bin/env python
"""Load an exported folder with transformers and let it write: `python generate.py FOLDER PROMPT [TOKENS]`."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    """Print the prompt and the likeliest next tokens."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("folder", type=Path, help="folder that `megashear export` wrote")
    parser.add_argument("prompt", help="text to go on from")
    parser.add_argument("tokens", type=int, nargs="?", default=40, help="new tokens (default: 40)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, goes on from {options.prompt!r}:")
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
