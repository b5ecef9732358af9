import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megashear.preprocess.document_order import find_duplicates
from megashear.preprocess.tokenized_parts import DOCUMENT, DocumentTable


def find(folder, tables, records: int) -> list[np.ndarray]:
    """`find_duplicates` of tables that lie in files."""
    for number, made in enumerate(tables):
        made.tofile(folder / f"{number}.bin")
    return find_duplicates([DocumentTable(folder / f"{number}.bin") for number in range(len(tables))], folder, records)


def table(digests) -> np.ndarray:
    made = np.zeros(len(digests), DOCUMENT)
    for row, (first, second) in enumerate(digests):
        made[row]["hash"], made[row]["check"] = first, second
    return made


def oracle(parts) -> list[list[bool]]:
    """By a set, one document after the other."""
    seen, flags = set(), []
    for digests in parts:
        flags.append([])
        for digest in digests:
            flags[-1].append(digest in seen)
            seen.add(digest)
    return flags


EDGES = st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**62 + 5])
PARTS = st.lists(st.lists(st.tuples(EDGES, st.integers(0, 2)), max_size=12), max_size=5)


@given(PARTS, st.integers(1, 20))
def test_later_copies_are_found_in_any_number_of_buckets(tmp_path_factory, parts, records):
    found = find(tmp_path_factory.mktemp("tables"), [table(part) for part in parts], records)
    assert [flags.tolist() for flags in found] == oracle(parts)


def test_many_documents(tmp_path):
    random = np.random.default_rng(0)
    made = np.zeros(200_000, DOCUMENT)
    made["hash"] = random.integers(0, 2**64, 50_000, dtype=np.uint64)[random.integers(0, 50_000, 200_000)]
    parts = np.split(made, [10, 10, 120_000])
    found = np.concatenate(find(tmp_path, parts, 30_000))
    _, first = np.unique(made["hash"], return_index=True)
    assert np.array_equal(np.flatnonzero(~found), np.sort(first))
    assert not list(tmp_path.glob(".digests*"))
