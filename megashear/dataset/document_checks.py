"""Check documents of a pair chunk by chunk: boundaries, end tokens, ids, duplicates across splits."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from megashear.dataset.indexed import IndexedTokens
from megashear.errors import DataError

CHUNK = 1 << 12  # documents looked at in one go


def chunk_count(opened: IndexedTokens) -> int:
    """How many chunks of documents a pair has."""
    return -(-opened.documents // CHUNK)


def chunk_places(opened: IndexedTokens, chunk: int) -> np.ndarray:
    """Where the documents of a chunk begin, in tokens, and the end of the last: int64 [documents + 1].

    Raises DataError where they do not lie back to back.
    """
    low = chunk * CHUNK
    bound_N = opened.bounds[low : min(low + CHUNK, opened.documents) + 1]
    if (np.diff(bound_N) < 0).any() or not 0 <= bound_N[0] <= bound_N[-1] <= opened.sequences:
        raise DataError(f"{opened.idx_path}: documents out of order; the file is damaged, make it again")
    first, last = int(bound_N[0]), int(bound_N[-1])
    length_S, offset_S = opened.lengths[first:last].astype(np.int64), opened.offsets[first:last]
    begin = int(offset_S[0]) // opened.dtype.itemsize if last > first else 0
    edge_S = begin + np.concatenate([[0], np.cumsum(length_S)])
    if (offset_S != edge_S[:-1] * opened.dtype.itemsize).any() or (length_S < 0).any() or begin < 0:
        raise DataError(f"{opened.idx_path}: sequences do not lie back to back; make the pair again")
    if edge_S[-1] > len(opened.tokens):
        raise DataError(f"{opened.idx_path}: documents end behind the last token; the file is damaged")
    edge_N: np.ndarray = edge_S[bound_N - first]
    return edge_N


def check_documents(opened: IndexedTokens, eos_id: int, vocab_size: int, chunks: Sequence[int] | None = None) -> None:
    """Refuse a pair with a document that does not end in the end token, or with an id outside of the vocabulary.

    chunks: those to look at; None: all, and that they cover all tokens. Raises DataError by file and document.
    """
    if not opened.documents:
        raise DataError(f"{opened.bin_path}: no document in it; leave the domain out")
    expected = 0
    for chunk in range(chunk_count(opened)) if chunks is None else chunks:
        edge_N = chunk_places(opened, chunk)
        if chunks is None and edge_N[0] != expected:
            raise DataError(f"{opened.idx_path}: documents do not lie back to back; make the pair again")
        expected = int(edge_N[-1])
        token_T = opened.tokens[int(edge_N[0]) : expected]
        length_N, last_N = np.diff(edge_N), edge_N[1:] - 1 - edge_N[0]
        bad = np.flatnonzero(length_N < 1)
        bad = bad if len(bad) else np.flatnonzero(token_T[last_N] != eos_id)
        if len(bad):
            raise DataError(
                f"{opened.bin_path}: document {chunk * CHUNK + int(bad[0])} does not end in the tokenizer's end token "
                f"{eos_id}; give the tokenizer that made the pair, or make it again with --append-eod"
            )
        if token_T.min() < 0 or token_T.max() >= vocab_size:
            raise DataError(
                f"{opened.bin_path}: a token outside of the tokenizer's {vocab_size} ids; give the right one"
            )
    if chunks is None and expected != len(opened.tokens):
        raise DataError(f"{opened.idx_path}: documents end at token {expected} of {len(opened.tokens)}; make it again")


def document_digests(opened: IndexedTokens, chunks: Iterable[int] | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Number, tokens, and 128 bits of blake2b of the ids (as int32) of each document; chunks: None for all."""
    for chunk in range(chunk_count(opened)) if chunks is None else chunks:
        edges = chunk_places(opened, chunk).tolist()
        for row, (start, stop) in enumerate(pairwise(edges)):
            ids = opened.tokens[start:stop].astype("<i4")
            yield chunk * CHUNK + row, stop - start, hashlib.blake2b(ids.data, digest_size=16).digest()


def refuse_both_sides(
    train: Sequence[IndexedTokens],
    heldout: Sequence[IndexedTokens],
    chunks: Sequence[Sequence[int] | None] | None = None,
) -> None:
    """Raise DataError where a held-out document is also one to train on, in whatever domain.

    chunks: of every training pair, those to look at; None: all.
    """
    held = {digest for one in heldout for _, _, digest in document_digests(one)}
    for one, chosen in zip(train, chunks or [None] * len(train), strict=True):
        for number, _, digest in document_digests(one, chosen):
            if digest in held:
                raise DataError(
                    f"{one.bin_path}: document {number} is held out as well; make the dataset again, documents that "
                    "are held out by their hash stand on one side"
                )
