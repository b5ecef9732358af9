"""Pairs that Megatron's own tools made, and datasets of an older megashear, as dataset folders with digests.

The rule for held-out documents: where a domain's held-out pair is given, both pairs are taken as they are (a hard link
where the file system has them) and in their order; otherwise documents are held out by the hash of their token ids as
`heldout.py` says, shuffled, and written anew. Key properties: either way every document ends in the end token and no
document stands on both sides, or the pair is refused. Read next: `merge.py`, `manifest.py`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megashear.data.indexed import IndexedTokens, pair
from megashear.data.manifest import SPLITS, prefix, write_dataset_manifest
from megashear.data.merge import Counts, Merging, merge_parts
from megashear.data.parts import DOCUMENT, Part
from megashear.data.tokenizer import Tokenizer, load_tokenizer
from megashear.errors import DataError
from megashear.files.atomic import atomic_folder
from megashear.files.manifest import NAME, check_files, read_manifest

CHUNK = 1 << 16  # documents looked at in one go


def document_places(opened: IndexedTokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First token and number of tokens of every document, int64 each, a chunk of documents at a time.

    Raises DataError where the documents do not lie back to back from the first token to the last.
    """
    expected, size = 0, opened.dtype.itemsize
    for low in range(0, opened.documents, CHUNK):
        bound_N = opened.bounds[low : min(low + CHUNK, opened.documents) + 1]
        if (np.diff(bound_N) < 0).any() or not 0 <= bound_N[0] <= bound_N[-1] <= opened.sequences:
            raise DataError(f"{opened.idx_path}: documents out of order; the file is damaged, make it again")
        length_S = opened.lengths[int(bound_N[0]) : int(bound_N[-1])].astype(np.int64)
        end_S = np.concatenate([[0], np.cumsum(length_S)]) + expected
        if (opened.offsets[int(bound_N[0]) : int(bound_N[-1])] != end_S[:-1] * size).any() or (length_S < 0).any():
            raise DataError(f"{opened.idx_path}: sequences do not lie back to back; make the pair again")
        edge_N = end_S[bound_N - bound_N[0]]
        expected = int(end_S[-1])
        yield edge_N[:-1], np.diff(edge_N)
    if expected != len(opened.tokens):
        raise DataError(f"{opened.idx_path}: documents end at token {expected} of {len(opened.tokens)}; make it again")


def check_documents(opened: IndexedTokens, eos_id: int, vocab_size: int) -> None:
    """Refuse a pair with a document that does not end in the end token, or with an id outside of the vocabulary."""
    before = 0
    if not opened.documents:
        raise DataError(f"{opened.bin_path}: no document in it; leave the domain out")
    for start_N, length_N in document_places(opened):
        if not len(start_N):
            continue
        token_T = opened.tokens[int(start_N[0]) : int(start_N[-1] + length_N[-1])]
        last_N = start_N + length_N - 1 - start_N[0]
        bad = np.flatnonzero((length_N < 1) | (token_T[np.maximum(last_N, 0)] != eos_id))
        if len(bad):
            raise DataError(
                f"{opened.bin_path}: document {before + int(bad[0])} does not end in the tokenizer's end token "
                f"{eos_id}; give the tokenizer that made the pair, or make it again with --append-eod"
            )
        if token_T.min() < 0 or token_T.max() >= vocab_size:
            raise DataError(
                f"{opened.bin_path}: a token outside of the tokenizer's {vocab_size} ids; give the right one"
            )
        before += len(start_N)


def document_digests(opened: IndexedTokens) -> Iterator[tuple[int, bytes]]:
    """Tokens of each document, and 128 bits of blake2b of its ids as int32."""
    for start_N, length_N in document_places(opened):
        for start, length in zip(start_N.tolist(), length_N.tolist(), strict=True):
            ids = opened.tokens[start : start + length].astype("<i4")
            yield length, hashlib.blake2b(ids.data, digest_size=16).digest()


def part_of(name: str, opened: IndexedTokens) -> Part:
    """A pair as a part of one domain, for `merge_parts`; no size of text is known."""
    table = np.zeros(opened.documents, DOCUMENT)
    for row, (length, digest) in enumerate(document_digests(opened)):
        table[row]["length"] = length
        table[row]["hash"], table[row]["check"] = np.frombuffer(digest, "<u8")
    return Part([name], table, opened.bin_path, opened.dtype)


def adopt(
    output: Path, pairs: dict[str, Path], heldout: dict[str, Path], tokenizer: Tokenizer, merging: Merging
) -> Counts:
    """Make the dataset folder `output` of pairs by domain (paths without `.bin`/`.idx`), held-out ones for all or none.

    Returns tokens and documents by domain and split. Raises DataError (a pair, the tokenizer) or StorageError (disk).
    """
    opened = {(name, "train"): IndexedTokens(path) for name, path in pairs.items()}
    opened |= {(name, "heldout"): IndexedTokens(path) for name, path in heldout.items()}
    for one in opened.values():
        check_documents(one, tokenizer.eos_id, tokenizer.vocab_size)
    with atomic_folder(output) as folder:
        if not heldout:
            parts = [part_of(name, opened[name, "train"]) for name in sorted(pairs)]
            counts, _ = merge_parts(folder, parts, tokenizer, merging, {"adopted": True})
            return counts
        refuse_both_sides(opened)
        counts = {}
        for (name, split), one in sorted(opened.items(), key=lambda item: (item[0][0], SPLITS.index(item[0][1]))):
            for source, target in zip((one.bin_path, one.idx_path), pair(prefix(folder, name, split)), strict=True):
                link(source, target)
            counts.setdefault(name, {})[split] = {"tokens": len(one.tokens), "documents": one.documents}
        (folder / "tokenizer").mkdir()
        for file in tokenizer.files:
            shutil.copyfile(file, folder / "tokenizer" / file.name)
        write_dataset_manifest(folder, counts, tokenizer, {"adopted": True})
    return counts


def refuse_both_sides(opened: dict[tuple[str, str], IndexedTokens]) -> None:
    """Raise DataError where a held-out document is also one to train on, in whatever domain."""
    held = {digest for (_, split), one in opened.items() if split == "heldout" for _, digest in document_digests(one)}
    for (_, split), one in opened.items():
        if split != "train":
            continue
        for number, (_, digest) in enumerate(document_digests(one)):
            if digest in held:
                raise DataError(
                    f"{one.bin_path}: document {number} is held out as well; leave the held-out pairs away to have "
                    "documents held out by their hash"
                )


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system cannot give one."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def upgrade(folder: Path) -> None:
    """Add the digests of blocks to a dataset folder of version 1, in place, after comparing its files' SHA-256.

    Raises DataError where it is another folder, or damaged; StorageError.
    """
    manifest = read_manifest(folder, DataError)
    if manifest.get("version") != 1:
        raise DataError(f"{folder / NAME}: format version {manifest.get('version')}; only version 1 lacks digests")
    check_files(folder, manifest, DataError)
    try:
        domains, eos = manifest["domains"], int(manifest["tokenizer"]["eos_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / NAME}: not the manifest of a dataset ({error!r}); make it again") from error
    own = ("version", "tokenizer", "domains", "files")
    extra = {key: value for key, value in manifest.items() if key not in own}
    write_dataset_manifest(folder, domains, load_tokenizer(folder / "tokenizer", eos_id=eos), extra)
