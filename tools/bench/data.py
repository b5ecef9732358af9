"""The dataset files against megatron-core's: writing an index, opening, random samples; and the state of the stream.

    python tools/bench/data.py FOLDER [--documents 10000000] [--rounds 7] [--json FILE]

FOLDER takes some 3 GB for the time of the run (10^7 documents). Every measurement runs in a process of its own, forms
taking turns; the table shows medians, their spread (half the distance between the quartiles, in percent), and memory
that the process gained at its peak.

    index    the `.idx` of so many documents: `write_index`, lengths coming in pieces as from a merge, against
             IndexedDatasetBuilder.finalize, lengths in lists as its users collect them (making them is not timed)
    open     ready to give samples: `Dataset.open` and one sample against GPTDataset (no cache yet) and one sample
    samples  4096 + 1 consecutive tokens at random, copied, per second, after a first pass over the data: against a bare
             memmap, IndexedDataset.get and GPTDataset (which adds masks and positions)
    resume   the blended stream's state after 12 million samples of 7 domains: loading it and planning the next batch
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megashear.dataset.dataset_folder import SPLITS, Dataset, prefix, write_dataset_manifest
from megashear.dataset.indexed import pair, write_index
from megashear.dataset.tokenizer import load_tokenizer
from megashear.files.atomic import write_json
from megashear.mixture.blend import BlendedStream, DomainSource

LENGTH, SEQUENCE, SAMPLES, STREAM, PIECE = 100, 4096, 20_000, 1 << 27, 1 << 20
FORMS = {
    "index": ("ours", "megatron-core"),
    "open": ("ours", "megatron-core"),
    "samples": ("ours", "memmap", "megatron-core get", "megatron-core"),
    "resume": ("ours",),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: value in the unit, its spread, memory gained in MiB, and ours against this form."""

    case: str
    form: str
    unit: str
    value: float
    spread: float
    mib: float
    ours_against_it: float


# ---- one measurement, in a process of its own ----


def resident(key: str) -> float:
    """MiB of this process now (VmRSS) or at its peak since it was reset (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def pieces(documents: int, length: int = LENGTH) -> Iterator[np.ndarray]:
    """Lengths of so many documents, int32 [documents], in pieces as large as a merge's."""
    for start in range(0, documents, PIECE):
        yield np.full(min(PIECE, documents - start), length, np.int32)


def index_ours(folder: Path, documents: int) -> Callable[[], float]:
    """Seconds of writing an index; making its lengths is timed as well."""

    def run() -> float:
        start = time.perf_counter()
        write_index(folder / "ours.idx", np.dtype(np.uint16), pieces(documents))
        return time.perf_counter() - start

    return run


def index_peer(folder: Path, documents: int) -> Callable[[], float]:
    """The same by megatron-core's builder; it collects lengths and documents in lists."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def run() -> float:
        builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
        builder.sequence_lengths = [LENGTH] * documents
        builder.document_indices = list(range(documents + 1))
        start = time.perf_counter()
        builder.finalize(str(folder / "theirs.idx"))
        return time.perf_counter() - start

    return run


def open_ours(folder: Path, documents: int) -> Callable[[], float]:
    """Seconds until a sample is there."""

    def run() -> float:
        start = time.perf_counter()
        tokens = Dataset.open(folder / "many").stream("web")
        assert len(tokens[SEQUENCE : 2 * SEQUENCE + 1]) == SEQUENCE + 1
        return time.perf_counter() - start

    return run


def gpt_dataset(path: Path) -> Any:
    """megatron-core's dataset of one epoch over a pair; it keeps its index in a cache beside the pair."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokens = pair(path)[0].stat().st_size // 2
    tokenizer: Any = type("Tokenizer", (), {"vocab_size": 32000, "eod": 0, "pad": -1, "unique_identifiers": {}})()
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQUENCE,
        blend=([str(path)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(path.parent.parent / "cache"),
    )
    indexed = IndexedDataset(str(path))
    chosen = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(path), chosen, (tokens - 1) // SEQUENCE, Split.train, config)


def open_peer(folder: Path, documents: int) -> Callable[[], float]:
    """The same by megatron-core."""
    import torch  # noqa: F401  (its import is not counted)
    from megatron.core.datasets import gpt_dataset as _  # noqa: F401

    shutil.rmtree(folder / "cache", ignore_errors=True)

    def run() -> float:
        start = time.perf_counter()
        assert len(gpt_dataset(prefix(folder / "many", "web", "train"))[1]["tokens"]) == SEQUENCE
        return time.perf_counter() - start

    return run


def samples(folder: Path, form: str) -> Callable[[], float]:
    """Samples per second."""
    path = prefix(folder / "stream", "web", "train")
    starts = np.random.default_rng(0).integers(0, STREAM - SEQUENCE - 1, SAMPLES).tolist()
    taken = np.empty(SEQUENCE + 1, np.uint16)
    source: Any
    if form == "megatron-core":
        source = gpt_dataset(path)
        for_sample = [start % len(source) for start in starts]
        read = source.__getitem__
    elif form == "megatron-core get":
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        source, for_sample, size = IndexedDataset(str(path)), starts, 1 << 20

        def read(start: int) -> None:
            start = min(start, start // size * size + size - SEQUENCE - 1)
            taken[:] = source.get(start // size, offset=start % size, length=SEQUENCE + 1)

    else:
        source, for_sample = Dataset.open(folder / "stream").stream("web"), starts
        if form == "memmap":
            source = np.memmap(pair(path)[0], np.uint16, "r")

        def read(start: int) -> None:
            taken[:] = source[start : start + SEQUENCE + 1]

    def run() -> float:
        for start in range(0, STREAM - SEQUENCE, SEQUENCE):  # every page is in memory, every block compared
            read(start if form != "megatron-core" else start // SEQUENCE % len(source))
        begin = time.perf_counter()
        for start in for_sample:
            read(start)
        return SAMPLES / (time.perf_counter() - begin)

    return run


def resume() -> Callable[[], float]:
    """Milliseconds from the state's JSON to the next batch."""
    sources = [DomainSource(f"domain{number}", 10**11 + number, SEQUENCE) for number in range(7)]
    weights = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]
    stream = BlendedStream(sources, 0, weights)
    for _ in range(12):
        stream.next_batch(1_000_000)
    saved = json.dumps(stream.state_dict())
    assert len(saved) <= 4096, f"the state takes {len(saved)} bytes"
    fresh = BlendedStream(sources, 0, weights)

    def run() -> float:
        start = time.perf_counter()
        fresh.load_state_dict(json.loads(saved))
        plan = fresh.next_batch(256)
        taken = 1e3 * (time.perf_counter() - start)
        assert plan.same(stream.next_batch(256))
        return taken

    return run


def measure(folder: Path, case: str, form: str, documents: int) -> dict[str, float]:
    """Run one measurement here: its value, and MiB gained at the peak."""
    if case == "samples":
        run = samples(folder, form)
    elif case == "resume":
        run = resume()
    else:
        makers = {"index": (index_ours, index_peer), "open": (open_ours, open_peer)}
        run = makers[case][form != "ours"](folder, documents)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    value = run()
    return {"value": value, "mib": max(resident("VmHWM") - before, 0.0)}


# ---- all of them ----


def make_data(folder: Path, documents: int) -> None:
    """A dataset of many short documents, and one of documents of 2^20 random tokens."""
    from tokenizers import Tokenizer, models

    words = folder / "tokenizer"
    words.mkdir(parents=True)
    Tokenizer(models.WordLevel({f"w{n}": n for n in range(32000)}, "w0")).save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text('{"eos_token": "w0"}')
    for name, count, length in (("many", documents, LENGTH), ("stream", STREAM >> 20, 1 << 20)):
        (folder / name).mkdir()
        counts = {}
        for split, documents_here in zip(SPLITS, (count, 1), strict=True):
            bin_path, idx_path = pair(prefix(folder / name, "web", split))
            write_index(idx_path, np.dtype(np.uint16), pieces(documents_here, length))
            with open(bin_path, "wb") as file:
                if name == "stream":
                    for number in range(documents_here):
                        ids = np.random.default_rng(number).integers(1, 32000, length, dtype=np.uint16)
                        ids[-1] = 0
                        file.write(ids.data)
                file.truncate(2 * length * documents_here)
            counts[split] = {"tokens": length * documents_here, "documents": documents_here}
        write_dataset_manifest(folder / name, {"web": counts}, load_tokenizer(words), {})


def run_all(folder: Path, documents: int, rounds: int, cases: list[str]) -> list[Row]:
    """Measure every form of every case in turns, each in a new process; print and return the rows."""
    print(f"{'case':8} {'form':18} {'value':>12} {'unit':10} {'+-%':>5} {'MiB':>8} {'ours against it':>16}", flush=True)
    rows = []
    for case in cases:
        found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS[case]}
        for _ in range(rounds):
            for form in FORMS[case]:
                command = [sys.executable, __file__, str(folder), "--documents", str(documents), "--one", case, form]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
                if done.returncode:
                    raise SystemExit(f"{case} {form} failed:\n{done.stderr}")
                found[form].append(json.loads(done.stdout.splitlines()[-1]))
        unit = {"index": "s", "open": "s", "samples": "samples/s", "resume": "ms"}[case]
        ours = statistics.median(one["value"] for one in found["ours"])
        for form, results in found.items():
            values = [one["value"] for one in results]
            value, mib = statistics.median(values), statistics.median(one["mib"] for one in results)
            low, _, high = statistics.quantiles(values, n=4)
            rows.append(Row(case, form, unit, value, 50 * (high - low) / value, mib, ours / value))
            row = rows[-1]
            shown = f"{value:12,.0f}" if value > 1000 else f"{value:12.4f}"
            ratio = f"{row.ours_against_it:16.3f}" if form != "ours" else " " * 16
            print(f"{case:8} {form:18} {shown} {unit:10} {row.spread:5.1f} {mib:8.1f} {ratio}", flush=True)
    return rows


def main() -> None:
    """Make the data, measure, print the table, write JSON where asked; the folder is removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist; removed at the end")
    parser.add_argument("--documents", type=int, default=10**7)
    parser.add_argument("--rounds", type=int, default=7, help="7 or more")
    parser.add_argument("--cases", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.folder, options.one[0], options.one[1], options.documents)))
        return
    if options.rounds < 7:
        parser.error("--rounds must be 7 or more: a median of fewer says little")
    if options.folder.exists():
        parser.error(f"{options.folder} is there already")
    try:
        make_data(options.folder, options.documents)
        rows = run_all(options.folder, options.documents, options.rounds, options.cases)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    if options.json is not None:
        write_json(options.json, {"documents": options.documents, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
