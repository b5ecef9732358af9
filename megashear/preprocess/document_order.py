"""Order of all documents of a dataset: domain, split and position, with bounded memory.

The order of a pair is a keyed permutation of its document numbers (shards in order, lines in order). Four passes over
the parts' tables use some ten MiB, one byte per document for duplicates, and 12 bytes per document that can be held
out. Records larger than memory are sorted in buckets on disk. Duplicates are found by 128 bits of the text's hash; the
first document in the order of shards and lines is the original.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megashear.dataset.samples import Permutation
from megashear.errors import DataError
from megashear.preprocess.dataset_report import describe
from megashear.preprocess.heldout_split import HeldOutRule, TokensByHash, heldout_hashes
from megashear.preprocess.tokenized_parts import DocumentTable, Part

RECORDS = 1 << 19  # a bucket should have, about
WAITING = 1 << 17  # records that are written together


class Buckets:
    """Records of one dtype in the buckets 0, 1, ... of a folder, which the caller makes and removes.

    OSErrors of the disk pass through.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, bucket_N: np.ndarray, record_N: np.ndarray) -> None:
        """Append records to their buckets, in the order given. bucket_N: of any integer dtype, [records]."""
        self._waiting.append((bucket_N, record_N))
        if sum(len(record_N) for _, record_N in self._waiting) >= WAITING:
            self._write()

    def _write(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        bucket_N, record_N = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        order_N = np.argsort(bucket_N, kind="stable")
        bucket_N, record_N = bucket_N[order_N], record_N[order_N]
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(bucket_N)) + 1).tolist(), len(bucket_N)]):
            if low < high:
                with open(self._path(int(bucket_N[low])), "ab") as file:
                    file.write(record_N[low:high].data)

    def read(self, bucket: int) -> np.ndarray:
        """The records of a bucket in the order in which they were added; none where none was."""
        self._write()
        path = self._path(bucket)
        return np.fromfile(path, self.dtype) if path.exists() else np.empty(0, self.dtype)

    def _path(self, bucket: int) -> Path:
        return self.folder / str(bucket)


DIGEST = np.dtype([("hash", "<u8"), ("check", "<u8"), ("place", "<u8")])  # place: among all documents


def find_duplicates(tables: Sequence[DocumentTable], folder: Path, records: int | None = None) -> list[np.ndarray]:
    """Which documents stood earlier: for every table bool [documents].

    The first of equal texts is no duplicate. folder: where 24 bytes a document lie for a while; records: documents
    compared at a time, about (None: RECORDS).
    """
    ends = np.cumsum([len(table) for table in tables], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    count = max(1, -(-total // (records or RECORDS)))
    duplicate_N, place = np.zeros(total, dtype=bool), 0
    with TemporaryDirectory(prefix=".digests", dir=folder) as temporary:
        buckets = Buckets(Path(temporary), DIGEST)
        for chunk in (chunk for table in tables for chunk in table.chunks()):
            digest_N = np.empty(len(chunk), DIGEST)
            digest_N["hash"], digest_N["check"] = chunk["hash"], chunk["check"]
            digest_N["place"] = np.arange(place, place + len(chunk))
            buckets.add((chunk["hash"] >> np.uint64(32)) * np.uint64(count) >> np.uint64(32), digest_N)
            place += len(chunk)
        for bucket in range(count):
            digest_N = buckets.read(bucket)
            later_N = later_copies(digest_N["hash"], digest_N["check"])
            duplicate_N[digest_N["place"][later_N].astype(np.int64)] = True
    return np.split(duplicate_N, ends[:-1]) if len(ends) else []


def later_copies(hash_N: np.ndarray, check_N: np.ndarray) -> np.ndarray:
    """Places, int64, of all but the first of equal pairs (hash, check), both uint64 [N]."""
    if not len(hash_N):
        return np.empty(0, np.int64)
    order_N = np.argsort(hash_N, kind="stable")
    same_N = hash_N[order_N][1:] == hash_N[order_N][:-1]
    twins_N = np.sort(order_N[np.append(same_N, False) | np.insert(same_N, 0, False)])
    hash_M, check_M = hash_N[twins_N], check_N[twins_N]
    order_M = np.lexsort((check_M, hash_M))  # stable: the first in the input comes first
    equal_M = (hash_M[order_M][1:] == hash_M[order_M][:-1]) & (check_M[order_M][1:] == check_M[order_M][:-1])
    later: np.ndarray = twins_N[order_M[1:][equal_M]]
    return later


# at: place in its bucket; part: number; start: first token in the part; length: tokens.
PLACE = np.dtype([("at", "<u4"), ("part", "<u4"), ("start", "<u8"), ("length", "<i4")])


@dataclass(frozen=True)
class Chunk:
    """Some documents of one part, in their order, each array [documents].

    part: its number; domain_N: numbers of domains; start_N: first token in the part; table: DOCUMENT; copy_N: whether
    the text stood earlier; kept_N: whether the dataset has it.
    """

    part: int
    domain_N: np.ndarray
    start_N: np.ndarray
    table: np.ndarray
    copy_N: np.ndarray
    kept_N: np.ndarray

    def domains(self) -> Iterator[tuple[int, np.ndarray]]:
        """The domains that occur, and which documents are theirs."""
        for number in np.unique(self.domain_N).tolist():
            yield number, self.domain_N == number


class Documents:
    """All documents of several parts, in order, some at a time.

    Attributes: `names` of the domains, sorted; `reports`, one a domain, of what the dataset has.
    """

    def __init__(self, parts: list[Part], drop: bool, folder: Path) -> None:
        """drop: leave documents out whose text stood earlier; folder: for files that are needed for a while.

        Raises DataError where a domain, or everything, has no document.
        """
        self.parts, self.drop = parts, drop
        self.names = sorted({name for part in parts for name in part.domains})
        if not self.names:
            raise DataError("no document in all shards; check the inputs, --text-key and bad_lines.jsonl")
        self._copies = find_duplicates([part.table for part in parts], folder)
        none = np.empty(0, np.int64)
        self.reports = [describe(name, none, none, 0) for name in self.names]
        self._by_hash = [TokensByHash() for _ in self.names]
        for chunk in self.chunks():
            for domain, mine_N in chunk.domains():
                table = chunk.table[mine_N & chunk.kept_N]
                copies = int((mine_N & chunk.copy_N).sum())
                self.reports[domain] += describe(self.names[domain], table["length"], table["bytes"], copies)
                self._by_hash[domain].add(table["hash"], table["length"])
        for report in self.reports:
            if not report.documents:
                raise DataError(
                    f"domain {report.name!r}: every one of its {report.duplicates} documents stood earlier in the "
                    "input; leave the domain out, or run without --drop-duplicates"
                )

    def chunks(self) -> Iterator[Chunk]:
        """All documents, some of one part at a time."""
        for number, (part, copy_N) in enumerate(zip(self.parts, self._copies, strict=True)):
            names = np.array([self.names.index(name) for name in part.domains], dtype=np.int64)
            first = tokens = 0
            for table in part.table.chunks():
                end_N = tokens + np.cumsum(table["length"], dtype=np.int64)
                mine_N = copy_N[first : first + len(table)]
                kept_N = ~mine_N if self.drop else np.ones(len(table), bool)
                yield Chunk(number, names[table["domain"]], end_N - table["length"], table, mine_N, kept_N)
                first, tokens = first + len(table), int(end_N[-1])

    def held_out(self, rule: HeldOutRule) -> np.ndarray:
        """Sorted hashes, uint64, of all texts that are held out; one that one domain holds out, all do."""
        bound_D = np.array([counted.bound(rule) for counted in self._by_hash], dtype=np.uint64)
        hashes: list[list[np.ndarray]] = [[] for _ in self.names]
        lengths: list[list[np.ndarray]] = [[] for _ in self.names]
        for chunk in self.chunks():
            low_N = chunk.kept_N & (chunk.table["hash"] <= bound_D[chunk.domain_N])
            for domain, mine_N in chunk.domains():
                hashes[domain].append(chunk.table["hash"][mine_N & low_N])
                lengths[domain].append(chunk.table["length"][mine_N & low_N])
        held = [np.empty(0, np.uint64)]
        for report, hash_P, length_P in zip(self.reports, hashes, lengths, strict=True):
            held.append(heldout_hashes(np.concatenate(hash_P), np.concatenate(length_P), rule, report.tokens))
        return np.unique(np.concatenate(held))


class Layout:
    """The pairs of a dataset, two a domain (training, held-out), and where their documents lie.

    Attributes, [domains, 2]: `documents`, `tokens`.
    """

    def __init__(self, found: Documents, held_U: np.ndarray, keys: list[tuple[int | str, ...]], folder: Path) -> None:
        """held_U: sorted hashes of held-out texts; keys: of the order, of every pair in turn; folder: empty, of the
        buckets, 20 bytes a document. Raises DataError where a domain is left without training documents.
        """
        self._buckets = Buckets(folder, PLACE)
        pairs = 2 * len(found.names)
        document_P, token_P = np.zeros(pairs, np.int64), np.zeros(pairs, np.int64)
        for chunk in found.chunks():
            pair_N = pairs_of(chunk, held_U)[chunk.kept_N]
            document_P += np.bincount(pair_N, minlength=pairs)
            token_P += np.bincount(pair_N, chunk.table["length"][chunk.kept_N], pairs).astype(np.int64)
        self.documents, self.tokens = document_P.reshape(-1, 2), token_P.reshape(-1, 2)
        for name, (train, held) in zip(found.names, self.documents.tolist(), strict=True):
            if not train:
                raise DataError(
                    f"domain {name!r}: every one of its {held} documents would be held out; "
                    "add text, give it to another domain (--domain-map) or lower --heldout-fraction"
                )
        self._first = np.cumsum([0, *-(-document_P // RECORDS)])
        orders = [Permutation(max(int(n), 1), *key) for n, key in zip(document_P, keys, strict=True)]
        seen_P = np.zeros(pairs, np.int64)
        for chunk in found.chunks():
            pair_N = pairs_of(chunk, held_U)
            for pair in np.unique(pair_N[chunk.kept_N]).tolist():
                rows = np.flatnonzero(chunk.kept_N & (pair_N == pair))
                self._place(chunk, rows, pair, orders[pair].inverse(seen_P[pair] + np.arange(len(rows))))
                seen_P[pair] += len(rows)

    def _place(self, chunk: Chunk, rows: np.ndarray, pair: int, position_N: np.ndarray) -> None:
        """Note the places of some documents of a chunk, int64 [rows], in a pair."""
        place_N = np.empty(len(rows), PLACE)
        place_N["at"], place_N["part"] = position_N % RECORDS, chunk.part
        place_N["start"], place_N["length"] = chunk.start_N[rows], chunk.table["length"][rows]
        self._buckets.add(self._first[pair] + position_N // RECORDS, place_N)

    def places(self, pair: int) -> Iterator[np.ndarray]:
        """The documents of a pair in their order, PLACE [up to RECORDS] each."""
        for bucket in range(self._first[pair], self._first[pair + 1]):
            place_N = self._buckets.read(bucket)
            ordered_N = np.empty_like(place_N)
            ordered_N[place_N["at"]] = place_N
            yield ordered_N


def pairs_of(chunk: Chunk, held_U: np.ndarray) -> np.ndarray:
    """Number of the pair of every document, int64 [documents]: twice the domain's, and one more if held out."""
    hash_N = chunk.table["hash"]
    found_N = np.searchsorted(held_U, hash_N)
    held_N = np.append(held_U, np.uint64(0))[found_N] == hash_N
    pair_N: np.ndarray = 2 * chunk.domain_N + (held_N & (found_N < len(held_U)))
    return pair_N
