"""Exact duplicates: documents whose text stood earlier in the input, in the order of shards and lines.

Key properties: 128 bits of the text decide, so that no document is taken for another; the answer depends on the order
of the shards alone; the whole input is compared, part by part of the hash's range, so that memory is bounded whatever
the number of documents (one byte a document, and some hundred MiB). Read next: `merge.py`.
"""

from collections.abc import Sequence

import numpy as np

DOCUMENTS_A_PASS = 1 << 23


def find_duplicates(tables: Sequence[np.ndarray], documents_a_pass: int = DOCUMENTS_A_PASS) -> list[np.ndarray]:
    """Which documents stood earlier: for every table (DOCUMENT [documents], `parts.py`) bool [documents].

    The first of equal texts is no duplicate. documents_a_pass: documents compared at a time, about.
    """
    ends = np.cumsum([len(table) for table in tables], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    duplicate_N = np.zeros(total, dtype=bool)
    passes = max(1, -(-total // documents_a_pass))
    for number in range(passes):
        low, high = (number << 64) // passes, ((number + 1) << 64) // passes - 1
        chosen = [np.flatnonzero((t["hash"] >= np.uint64(low)) & (t["hash"] <= np.uint64(high))) for t in tables]
        picked = [table[rows] for table, rows in zip(tables, chosen, strict=True)]
        if sum(len(rows) for rows in chosen):
            place_N = np.concatenate([rows + end - len(t) for t, rows, end in zip(tables, chosen, ends, strict=True)])
            hash_N = np.concatenate([rows["hash"] for rows in picked])
            check_N = np.concatenate([rows["check"] for rows in picked])
            duplicate_N[place_N[later_copies(hash_N, check_N)]] = True
    return np.split(duplicate_N, ends[:-1]) if len(ends) else []


def later_copies(hash_N: np.ndarray, check_N: np.ndarray) -> np.ndarray:
    """Places, int64, of all but the first of equal pairs (hash, check), both uint64 [N]."""
    order_N = np.argsort(hash_N, kind="stable")
    same_N = hash_N[order_N][1:] == hash_N[order_N][:-1]
    twins_N = np.sort(order_N[np.append(same_N, False) | np.insert(same_N, 0, False)])
    hash_M, check_M = hash_N[twins_N], check_N[twins_N]
    order_M = np.lexsort((check_M, hash_M))  # stable: the first in the input comes first
    equal_M = (hash_M[order_M][1:] == hash_M[order_M][:-1]) & (check_M[order_M][1:] == check_M[order_M][:-1])
    return twins_N[order_M[1:][equal_M]]
