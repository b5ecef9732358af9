"""Compare logits and greedy decoding of any Hugging Face LLaMA folder with transformers', layout by layout.

    PYTHONPATH=.:tests python -m parallel.prove_logits FOLDER [TPxPP[+SP] ...]

Everything runs in fp32 on the CPU, one torchrun job per layout. Prints a table: the largest difference of a logit
over the prompt, and how many of 64 greedy tokens agree before the first that differs. A layout that cannot carry the
model is refused as `megashear check` refuses it, and its line says why. Exit code 1 where a logit is further apart
than 1e-3 or a token differs. The prompt is a text by the folder's tokenizer.json, or the first token ids where there
is none.
"""

import argparse
import sys
import time
from pathlib import Path

from helpers.ranks import Ranks
from megashear.config.schema import ParallelConfig
from megashear.config.shape_legality import shape_problems
from megashear.hf.model_folder import ModelFolder
from parallel.oracle import transformers_greedy

LAYOUTS = ("1x1", "2x1", "2x1+SP", "1x2", "2x2", "2x2+SP", "3x1", "3x1+SP")
TEXT = "Once upon a time there was a little girl who lived near the sea, and every morning she"
NEW_TOKENS, LIMIT = 64, 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("layouts", nargs="*", default=LAYOUTS, metavar="TPxPP[+SP]")
    options = parser.parse_args()
    source, prompt = ModelFolder.open(options.folder), prompt_of(options.folder)
    wanted = transformers_greedy(options.folder, prompt, NEW_TOKENS)
    largest = float(wanted["logits"].abs().max())
    print(f"{options.folder}: {source.shape}\nlargest logit {largest:.1f}, prompt {len(prompt)}")
    print(f"{'TP x PP':10s}  {'max |difference|':16s}  greedy tokens equal  seconds")
    failed = False
    for layout in options.layouts:
        tensor, pipeline = map(int, layout.removesuffix("+SP").split("x"))
        parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": layout.endswith("+SP")}
        if problems := shape_problems(source.shape, None, ParallelConfig(**parallel), tensor * pipeline):
            print(f"{layout:10s}  refused: " + "; ".join(problems), flush=True)
            continue
        start, ranks = time.monotonic(), Ranks(tensor * pipeline)
        arguments = {"folder": str(options.folder.resolve()), "prompt": prompt, "new_tokens": NEW_TOKENS}
        found = ranks.call("parallel.logits_case:greedy", timeout=1800, parallel=parallel, **arguments)
        ranks.stop()
        apart = float((found["logits"] - wanted["logits"]).abs().max())
        pairs = zip(found["tokens"], wanted["tokens"], strict=True)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), NEW_TOKENS)
        failed = failed or apart > LIMIT or equal < NEW_TOKENS
        seconds = time.monotonic() - start
        print(f"{layout:10s}  {apart:<16.1e}  {equal:2d} of {NEW_TOKENS:<13d}  {seconds:.0f}", flush=True)
    return int(failed)


def prompt_of(folder: Path) -> list[int]:
    """Token ids of the text, or small ids where the folder has no tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        return list(range(1, 24))
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids


if __name__ == "__main__":
    sys.exit(main())
