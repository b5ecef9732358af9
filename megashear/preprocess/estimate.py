"""Estimate tokens, time and disk space of a preprocessing run from a sample of its shards.

Writes nothing. Shards are grouped by domain and sampled evenly in each group, from their beginnings. The error is that
of sampling some shards only.
"""

import hashlib
import math
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megashear.dataset.indexed import token_dtype
from megashear.dataset.tokenizer import Tokenizer, load_tokenizer
from megashear.preprocess.build_dataset import Preprocessing, refuse_output
from megashear.preprocess.document_order import PLACE
from megashear.preprocess.domains import NoDomain, shard_domain
from megashear.preprocess.shard_files import BadLine, find_shards
from megashear.preprocess.shard_reader import ShardReader
from megashear.preprocess.tokenized_parts import DOCUMENT, PartSettings

SHARDS = 24  # sampled in all, but one of every group at least
SAMPLE = 2 << 20  # bytes read of each, about
INDEX_ENTRY = 20  # bytes of a document in an `.idx`


@dataclass
class ShardSample:
    """The beginning of a shard: bytes of the file, seconds it took, lines, and tokens and documents by domain."""

    bytes: int = 0
    seconds: float = 0.0
    lines: int = 0
    bad: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Estimate:
    """What a run would give: tokens and documents by domain (error: relative standard error of all tokens, NaN where it
    is not known), seconds of tokenising and of merging, bytes on the disk while it runs and when it is done.
    """

    shards: int
    sampled_shards: int
    bytes: int
    sampled_bytes: int
    tokens: dict[str, int]
    documents: dict[str, int]
    error: float
    bad_fraction: float
    tokenise_seconds: float
    merge_seconds: float
    running_bytes: int
    final_bytes: int
    free_bytes: int


def sample_shard(path: Path, tokenizer: Tokenizer, settings: PartSettings, limit: int = SAMPLE) -> ShardSample:
    """Tokenise a shard up to about `limit` bytes of the file; raises DataError."""
    reader = ShardReader(path, settings.text_key, (settings.rule.key,))
    found, start, read = ShardSample(), time.perf_counter(), 0
    for entry in reader:
        # The lines so far came from the bytes before the chunk that was just taken.
        if reader.bytes_read != read and (read := reader.bytes_read) > limit and found.bytes:
            break
        found.bytes, found.lines = read, found.lines + 1
        try:
            if isinstance(entry, BadLine):
                raise NoDomain(entry.reason)
            domain = settings.rule.of(entry.record, path)
        except NoDomain:
            found.bad += 1
            continue
        found.tokens[domain] += len(tokenizer.encode(entry.text)) + 1
        found.documents[domain] += 1
    else:
        found.bytes = reader.bytes_read
    found.seconds = time.perf_counter() - start
    return found


def sampled(shards: Sequence[Path], wanted: int) -> list[Path]:
    """`wanted` shards, at least one, spread evenly."""
    count = max(1, min(wanted, len(shards)))
    return [shards[(2 * i + 1) * len(shards) // (2 * count)] for i in range(count)]


def estimate(job: Preprocessing, shards_sampled: int = SHARDS, limit: int = SAMPLE) -> Estimate:
    """Estimate what `preprocess(job)` would do; raises DataError (inputs, tokenizer) as it would."""
    refuse_output(job.output)
    tokenizer, shards = load_tokenizer(job.tokenizer), find_shards(job.inputs)
    tokenizer.encode("x")  # what encoders do once is not counted
    size = {shard: shard.stat().st_size for shard in shards}
    groups: dict[str, list[Path]] = {}
    for shard in shards:
        groups.setdefault(shard_domain(shard), []).append(shard)
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    samples, seconds, longest, variance = [], 0.0, 0.0, 0.0
    for group in groups.values():
        mine = [
            sample_shard(shard, tokenizer, job.part, limit)
            for shard in sampled(group, round(shards_sampled * len(group) / len(shards)))
        ]
        samples += mine
        read, whole = max(sum(one.bytes for one in mine), 1), sum(size[shard] for shard in group)
        for one in mine:
            tokens.update({name: round(count * whole / read) for name, count in one.tokens.items()})
            documents.update({name: round(count * whole / read) for name, count in one.documents.items()})
        rate = sum(one.seconds for one in mine) / read
        seconds, longest = seconds + rate * whole, max(longest, rate * max(size[shard] for shard in group))
        variance += group_variance(mine, len(group), whole)
    total, lines = sum(tokens.values()), sum(one.lines for one in samples)
    item = token_dtype(tokenizer.vocab_size).itemsize
    final = total * item + sum(documents.values()) * INDEX_ENTRY
    return Estimate(
        shards=len(shards),
        sampled_shards=len(samples),
        bytes=sum(size.values()),
        sampled_bytes=sum(one.bytes for one in samples),
        tokens=dict(sorted(tokens.items())),
        documents=dict(sorted(documents.items())),
        error=math.sqrt(variance) / max(total, 1),
        bad_fraction=sum(one.bad for one in samples) / max(lines, 1),
        tokenise_seconds=max(seconds / job.workers, longest),
        merge_seconds=total * item * digest_seconds() / job.workers,
        running_bytes=final + total * item + sum(documents.values()) * (DOCUMENT.itemsize + PLACE.itemsize),
        final_bytes=final,
        free_bytes=shutil.disk_usage(next(p for p in job.output.absolute().parents if p.exists())).free,
    )


def group_variance(samples: Sequence[ShardSample], shards: int, size: int) -> float:
    """Variance of a group's tokens, its shards' tokens a byte differing as the samples' do; NaN where one stands for
    several.
    """
    count = len(samples)
    if count == shards and all(one.bytes for one in samples):
        return 0.0
    if count < 2:
        return math.nan
    rates = [sum(one.tokens.values()) / max(one.bytes, 1) for one in samples]
    mean = sum(rates) / count
    return size**2 * sum((rate - mean) ** 2 for rate in rates) / (count - 1) / count * (1 - count / shards)


def digest_seconds() -> float:
    """Seconds that digests of a byte take here: what merging costs beside the disk is about as much."""
    data = os.urandom(1 << 22)
    start = time.perf_counter()
    hashlib.sha256(data)
    zlib.crc32(data)
    return 2 * (time.perf_counter() - start) / len(data)


def estimate_text(found: Estimate, workers: int) -> str:
    """The estimate as text."""
    rows = [("domain", "tokens", "documents")]
    rows += [(name, f"{count:,}", f"{found.documents[name]:,}") for name, count in found.tokens.items()]
    rows.append(("all", f"{sum(found.tokens.values()):,}", f"{sum(found.documents.values()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([r[0].ljust(widths[0]), r[1].rjust(widths[1]), r[2].rjust(widths[2])]) for r in rows]
    if not math.isnan(found.error):
        lines[-1] += f"  (tokens +- {found.error:.1%})"
    both = found.tokenise_seconds + found.merge_seconds
    return "\n".join(
        [
            f"estimated from {found.sampled_shards} of {found.shards} shards, "
            f"{found.sampled_bytes / 1e6:,.1f} of {found.bytes / 1e6:,.1f} MB; nothing is written",
            *lines,
            f"bad lines: {found.bad_fraction:.3%}",
            f"time: {clock(both)} with {workers} workers (tokenise {clock(found.tokenise_seconds)}, merge "
            f"{clock(found.merge_seconds)}), the disk not counted",
            f"disk: {found.running_bytes / 1e9:,.3f} GB while it runs, {found.final_bytes / 1e9:,.3f} GB when it is "
            f"done, {found.free_bytes / 1e9:,.1f} GB free",
        ]
    )


def clock(seconds: float) -> str:
    """h:mm:ss, rounded up."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
