"""Exact duplicates: documents whose text stood earlier in the input, in the order of shards and lines.

Key properties: 128 bits of the text decide, so that no document is taken for another; the answer depends on the order
of the shards alone; documents are compared bucket by bucket of the hash's range, so that memory is one byte a document
and some ten MiB, whatever their number. Read next: `order.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megashear.data.buckets import RECORDS, Buckets
from megashear.data.parts import DocumentTable

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
