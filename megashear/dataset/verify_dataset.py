"""Verify a dataset folder against its manifest, completely or on a sample.

Checks names and sizes of files, SHA-256 (on a sample: CRC-32 of some blocks), the index of every pair, end tokens and
ids of documents, that no document is in both splits, and the tokenizer. Reports every problem, not only the first.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megashear.dataset.dataset_folder import SPLITS, Dataset
from megashear.dataset.document_checks import check_documents, chunk_count, refuse_both_sides
from megashear.errors import DataError
from megashear.files.file_digests import NAME, check_files, read_manifest


@dataclass
class Findings:
    """What a verification found: `checked`, a line for each kind of promise that holds; `problems`, one line each."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def look(self, what: str, check: Callable[[], Any]) -> Any:
        """Note the problem that `check` raises, or that `what` holds; returns what it returns."""
        try:
            result = check()
        except DataError as error:
            self.problems.append(str(error))
            return None
        if what:
            self.checked.append(what)
        return result


def verify_dataset(folder: Path, fraction: float = 1.0, seed: int = 0, workers: int = 1) -> Findings:
    """Compare a dataset folder with its manifest. fraction: share of the blocks and documents looked at, above 0.

    Raises DataError only where there is no manifest to compare with.
    """
    folder, findings, dice = Path(folder), Findings(), random.Random(seed)
    manifest = read_manifest(folder, DataError)
    sampled = {name for name in manifest["files"] if fraction < 1 and name.endswith((".bin", ".idx"))}
    with ThreadPoolExecutor(workers) as pool:
        one_by_one = [{"files": {name: entry}} for name, entry in manifest["files"].items()]
        checks = [
            pool.submit(check_files, folder, one, DataError, digests=not sampled & set(one["files"]))
            for one in one_by_one
        ]
        for check in checks:
            findings.look("", check.result)
    strange = sorted(unnamed(folder, set(manifest["files"])))
    findings.problems += [f"{folder / name}: not named in the manifest; remove it" for name in strange]
    if not findings.problems:
        kind = "sizes of all, SHA-256 of small files" if sampled else "size and SHA-256"
        findings.checked.append(f"{len(manifest['files'])} files: {kind}")
    dataset = findings.look("sizes, counts and block digests of every pair", lambda: Dataset.open(folder))
    if dataset is not None:
        verify_documents(dataset, findings, fraction, dice)
        findings.look("the tokenizer", dataset.tokenizer)
    return findings


def unnamed(folder: Path, named: set[str]) -> set[str]:
    """Files in the folder that the manifest does not name."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - named - {NAME}


def verify_documents(dataset: Dataset, findings: Findings, fraction: float, dice: random.Random) -> None:
    """Compare blocks, documents and sides of every pair."""
    pairs = {(d, s): dataset.pair(d, s) for d in dataset.domains for s in SPLITS}
    chunks = {key: choose(chunk_count(one), fraction, dice) for key, one in pairs.items()}
    before = len(findings.problems)
    for key, one in pairs.items():
        if fraction < 1:
            findings.look("", partial(one.check_blocks, choose(one.blocks, fraction, dice)))
        if one.documents:
            findings.look("", partial(check_documents, one, dataset.eos_id, dataset.vocab_size, chunks[key]))
    if len(findings.problems) > before:
        return
    share = "every document" if fraction >= 1 else f"{fraction:.2%} of blocks and documents"
    findings.checked.append(f"index, end token and ids of {share}")
    train, held = ([pairs[d, s] for d in dataset.domains] for s in SPLITS)
    chosen = [chunks[d, "train"] for d in dataset.domains]
    findings.look(
        f"no held-out document among the training documents ({share})", lambda: refuse_both_sides(train, held, chosen)
    )


def choose(count: int, fraction: float, dice: random.Random) -> list[int] | None:
    """Some of 0..count-1 in order, at least one where there is one; None for all."""
    return None if fraction >= 1 else sorted(dice.sample(range(count), min(count, max(1, round(count * fraction)))))
