"""Adopt pairs that Megatron's own tools wrote, as a dataset folder with digests.

If a held-out pair is given, both pairs are taken as they are (hard links if possible). Otherwise documents are held out
by the hash of their token ids, shuffled, and written again. Every document must end in the end token, and no document
may be in both splits.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megashear.dataset.dataset_folder import SPLITS, prefix, write_dataset_manifest
from megashear.dataset.document_checks import check_documents, chunk_count, document_digests, refuse_both_sides
from megashear.dataset.indexed import IndexedTokens, pair
from megashear.dataset.tokenizer import Tokenizer
from megashear.files.atomic import atomic_folder
from megashear.preprocess.merge_parts import Counts, Merging, merge_parts
from megashear.preprocess.tokenized_parts import DOCUMENT, DocumentTable, Part


def part_of(name: str, opened: IndexedTokens, path: Path) -> Part:
    """A pair as a part of one domain, for `merge_parts`, its table in the file `path`; no size of text is known."""
    with open(path, "wb") as file:
        for chunk in range(chunk_count(opened)):
            found = list(document_digests(opened, [chunk]))
            table = np.zeros(len(found), DOCUMENT)
            table["length"] = [length for _, length, _ in found]
            table["hash"], table["check"] = np.frombuffer(b"".join(one for *_, one in found), "<u8").reshape(-1, 2).T
            file.write(table.data)
    return Part([name], DocumentTable(path), len(opened.tokens), opened.bin_path, opened.dtype)


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
            with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as tables:
                paths = [Path(tables) / str(number) for number in range(len(pairs))]
                parts = [part_of(name, opened[name, "train"], p) for name, p in zip(sorted(pairs), paths, strict=True)]
                return merge_parts(folder, parts, tokenizer, merging, {"adopted": True})[0]
        trained = [one for (_, split), one in opened.items() if split == "train"]
        refuse_both_sides(trained, [one for (_, split), one in opened.items() if split == "heldout"])
        counts: Counts = {}
        for (name, split), one in sorted(opened.items(), key=lambda item: (item[0][0], SPLITS.index(item[0][1]))):
            for source, target in zip((one.bin_path, one.idx_path), pair(prefix(folder, name, split)), strict=True):
                link(source, target)
            counts.setdefault(name, {})[split] = {"tokens": len(one.tokens), "documents": one.documents}
        (folder / "tokenizer").mkdir()
        for file in tokenizer.files:
            shutil.copyfile(file, folder / "tokenizer" / file.name)
        write_dataset_manifest(folder, counts, tokenizer, {"adopted": True})
    return counts


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system cannot give one."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
