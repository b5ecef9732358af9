"""Tokenization: a whole preprocessing run against Megatron's way, and one long document against both libraries.

    python tools/bench/tokenization.py SHARD.jsonl... --tokenizer FOLDER [--workers 1 2] [--rounds 5] [--json FILE]

`run`: `preprocess` from the shards to the finished dataset, as `tools/preprocess_data.py` calls it, against a stand-in
with the structure of Megatron's preprocess_data.py: a pool of processes that parse a line and encode its text with the
SentencePiece library, in chunks of 32 lines, and a parent that writes their ids through megatron-core's
IndexedDatasetBuilder. Both write the same documents: their ids are compared before times are taken. Give at least as
many shards as workers, a shard is one worker's.

`document`: 5 MB of the shards' text as one text, by loaded tokenizers, ours with an empty cache; ids are compared.

All forms take turns; medians, and half the distance between the quartiles in percent of them. The tokenizer's folder
holds `tokenizer.model`, and `tokenizer.json` where the tokenizers library is to be measured too.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
import tokenizers

from megashear.dataset.dataset_folder import SPLITS, prefix
from megashear.dataset.indexed import IndexedTokens, token_dtype
from megashear.dataset.tokenizer import load_tokenizer
from megashear.files.atomic import write_json
from megashear.preprocess.build_dataset import Preprocessing, preprocess
from megashear.preprocess.domains import DomainRule
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging
from megashear.preprocess.tokenized_parts import PartSettings

CHUNK, DOCUMENT_BYTES, DOMAIN = 32, 5_000_000, "all"


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, spread in percent of the median, and millions of bytes and tokens a second."""

    what: str
    form: str
    seconds: float
    spread: float
    mb_per_second: float
    mtok_per_second: float


# ---- the stand-in: processes that encode, a parent that writes ----


class LineEncoder:
    """What a process of the stand-in does with a line."""

    model: sentencepiece.SentencePieceProcessor

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        """Load the model, once a process."""
        LineEncoder.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))

    def encode(self, line: str) -> tuple[list[int], int]:
        """Ids of a line's text with the end token, and the line's length."""
        ids = LineEncoder.model.encode(json.loads(line)["text"])
        return [*ids, LineEncoder.model.eos_id()], len(line)


def stand_in(shards: list[Path], model: Path, output: Path, workers: int) -> None:
    """Write the pair `output`.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoder = LineEncoder(model)
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=token_dtype(vocabulary).type)
    with multiprocessing.get_context("fork").Pool(workers, initializer=encoder.start) as pool:
        for ids, _ in pool.imap(encoder.encode, lines(shards), CHUNK):
            builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{output}.idx")


def lines(shards: list[Path]) -> Iterator[str]:
    """All lines of all shards."""
    for shard in shards:
        with open(shard, encoding="utf-8") as file:
            yield from file


# ---- ours ----


def run_ours(shards: list[Path], model: Path, output: Path, workers: int) -> None:
    """The dataset folder `output`."""
    job = Preprocessing(
        [str(shard) for shard in shards],
        model,
        output,
        Merging(HeldOutRule()),
        PartSettings(rule=DomainRule(DOMAIN)),
        workers=workers,
    )
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        preprocess(job)


def digests(pairs: list[Path]) -> tuple[list[bytes], int]:
    """The sorted digests of all documents of some pairs, whose order differs, and their tokens."""
    found, total = [], 0
    for pair in pairs:
        opened = IndexedTokens(pair)
        found += [hashlib.sha256(opened.document(i).tobytes()).digest() for i in range(opened.documents)]
        total += len(opened.tokens)
    return sorted(found), total


# ---- measuring ----


def measure(forms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each form says it took, in turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            times[name].append(form())
    return times


def timed(work: Callable[[], object]) -> float:
    """Seconds of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rows(what: str, times: dict[str, list[float]], size: int, tokens: int) -> Iterator[Row]:
    """Lines of the table, printed as well."""
    for form, seconds in times.items():
        median = statistics.median(seconds)
        row = Row(what, form, median, spread(seconds), size / median / 1e6, tokens / median / 1e6)
        rates = f"{row.mb_per_second:8.2f} {row.mtok_per_second:8.2f}"
        print(f"{what:18} {form:14} {median:8.3f} {row.spread:5.1f} {rates}", flush=True)
        yield row


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, in percent of the median."""
    low, _, high = statistics.quantiles(times, n=4)
    return 50 * (high - low) / statistics.median(times)


def compare_runs(shards: list[Path], model: Path, workers: int) -> int:
    """Run both forms once and stop where they write other documents; returns the tokens of one."""
    with TemporaryDirectory() as folder:
        run_ours(shards, model, Path(folder, "ours"), workers)
        stand_in(shards, model, Path(folder, "theirs"), workers)
        ours, tokens = digests([prefix(Path(folder, "ours"), DOMAIN, split) for split in SPLITS])
        theirs, _ = digests([Path(folder, "theirs")])
    if ours != theirs:
        raise SystemExit("the two runs wrote different documents")
    return tokens


def measure_runs(shards: list[Path], model: Path, workers: int, rounds: int) -> list[Row]:
    """Whole runs with so many workers."""

    def timed_run(run: Callable[[list[Path], Path, Path, int], None]) -> float:
        with TemporaryDirectory() as folder:
            return timed(lambda: run(shards, model, Path(folder, "made"), workers))

    tokens = compare_runs(shards, model, workers)
    forms = {"ours": lambda: timed_run(run_ours), "megatron's way": lambda: timed_run(stand_in)}
    size = sum(shard.stat().st_size for shard in shards)
    return list(rows(f"run, {workers} workers", measure(forms, rounds), size, tokens))


def long_text(shards: list[Path]) -> str:
    """The shards' texts, line after line, DOCUMENT_BYTES of them."""
    texts, size = [], 0
    for line in lines(shards):
        texts.append(json.loads(line)["text"])
        size += len(texts[-1].encode()) + 1
        if size >= DOCUMENT_BYTES:
            break
    return "\n".join(texts).encode()[:DOCUMENT_BYTES].decode("utf-8", "ignore")


def measure_document(text: str, folder: Path, rounds: int) -> list[Row]:
    """One long document by both libraries, and by ours from either file."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    forms = {"ours": lambda: timed_ours(folder / "tokenizer.model", text, pieces.encode(text))}
    forms["sentencepiece"] = lambda: timed(lambda: pieces.encode(text))
    if (folder / "tokenizer.json").is_file():
        faces = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = faces.encode(text, add_special_tokens=False).ids
        forms["ours, json"] = lambda: timed_ours(folder / "tokenizer.json", text, expected)
        forms["tokenizers"] = lambda: timed(lambda: faces.encode(text, add_special_tokens=False))
    size = len(text.encode())
    return list(rows("document", measure(forms, rounds), size, len(pieces.encode(text))))


def timed_ours(path: Path, text: str, expected: list[int]) -> float:
    """Seconds of our encoder, freshly loaded; stops where it is not the compiled one, or gives other ids."""
    tokenizer = load_tokenizer(path)
    if not tokenizer.served_by.startswith("compiled"):
        raise SystemExit(f"{path} is served by the {tokenizer.served_by}")
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    seconds = time.perf_counter() - start
    if ids.tolist() != expected:
        raise SystemExit(f"{path}: the ids differ from the library's")
    return seconds


def main() -> None:
    """Measure runs and the document, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARD", help="plain .jsonl files with a field `text`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.model")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="processes, one measurement for each")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all forms, 3 or more")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds must be 3 or more: a median of fewer says little")
    if len(options.shards) < max(options.workers, default=0):
        parser.error("give at least as many shards as workers, a shard is one worker's")
    print(f"{'what':18} {'form':14} {'s':>8} {'+-%':>5} {'MB/s':>8} {'Mtok/s':>8}")
    found = measure_document(long_text(options.shards), options.tokenizer, options.rounds)
    for workers in options.workers:
        found += measure_runs(options.shards, options.tokenizer / "tokenizer.model", workers, options.rounds)
    if options.json is not None:
        write_json(options.json, {"rows": [asdict(row) for row in found]})


if __name__ == "__main__":
    main()
