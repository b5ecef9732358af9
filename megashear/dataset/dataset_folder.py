"""Dataset folder: one `.bin`/`.idx` pair per domain and split, tokenizer files, and `manifest.json`.

`<domain>.train.bin/.idx/.crc`, `<domain>.heldout.bin/.idx/.crc`, `tokenizer/`. The manifest lists domains (in the order
of all weights), counts, the tokenizer and the digest of every file. Opening compares sizes and counts, reading verifies
blocks, `verify_dataset` compares everything. Opening takes the same time for any number of documents.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megashear.dataset.block_digests import BLOCK, CheckedArray, digest_file, read_block_digests, write_block_digests
from megashear.dataset.indexed import IndexedTokens, pair
from megashear.dataset.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from megashear.errors import DataError
from megashear.files.atomic import write_json
from megashear.files.file_digests import NAME, check_files, digest, read_manifest

VERSION = 2  # 1 had no digests of blocks
SPLITS = ("train", "heldout")
LONGEST_NAME = 200


def check_domain_name(name: Any) -> str | None:
    """Why `name` cannot be a domain's name (it becomes a file name), or None where it can."""
    if not isinstance(name, str) or not name.strip():
        return "is not a name"
    if any(c in "/\\" or ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name) or name[0] == ".":
        return "holds a slash, a backslash or a control character, or begins with a dot"
    if len(name.encode("utf-8")) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return None


def prefix(folder: Path, domain: str, split: str) -> Path:
    """Path of a domain's pair without `.bin`/`.idx`."""
    return Path(folder) / f"{domain}.{split}"


def write_dataset_manifest(
    folder: Path,
    domains: dict[str, dict[str, dict[str, int]]],
    tokenizer: Tokenizer,
    extra: dict[str, Any],
    each: Callable[..., Iterable[Any]] = map,
) -> None:
    """Write the block digests of all pairs and `manifest.json` of a folder whose pairs are whole.

    domains: {name: {split: {"tokens", "documents"}}} in the order of all weights; extra: more keys; each: `map`, or one
    over several processes. Raises StorageError.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME and p.suffix != ".crc")
    found = dict(zip(paths, each(partial(digest_file, block=BLOCK), paths), strict=True))
    for name, split in ((name, split) for name in domains for split in SPLITS):
        bin_path, idx_path = pair(prefix(folder, name, split))
        written = write_block_digests(prefix(folder, name, split), found[bin_path], found[idx_path], BLOCK)
        found[written] = digest_file(written)
    names = {path.relative_to(folder).as_posix(): digests for path, digests in found.items()}
    files = {name: {"bytes": names[name].size, "sha256": names[name].sha256} for name in sorted(names)}
    described = {
        "digest": tokenizer.digest,
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }
    content = {"version": VERSION, "tokenizer": described, "domains": domains, **extra, "files": files}
    write_json(folder / NAME, content)


class Dataset:
    """An opened dataset folder.

    Attributes: `folder`; `domains`, names in order; `tokenizer_digest` (SHA-256 of the tokenizer's file); `vocab_size`;
    `eos_id`, the token that ends every document; `manifest`, the whole manifest.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`, comparing the size of every file and the counts of every pair. Raises DataError."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, DataError)
        self._read_keys()
        check_files(self.folder, self.manifest, DataError, digests=False)
        self._pairs = {(d, s): self._open_pair(d, s) for d in self.domains for s in SPLITS}

    @classmethod
    def open(cls, folder: Path | str) -> "Dataset":
        """Open a dataset folder made by tools/preprocess_data.py; raises DataError naming the file that is at fault."""
        return cls(Path(folder))

    def _read_keys(self) -> None:
        """Take the manifest's own keys; anything odd is refused, since names become paths and counts become sizes."""
        where = self.folder / NAME
        try:
            version = self.manifest["version"]
            described = self.manifest["tokenizer"]
            self.counts: dict[str, dict[str, dict[str, int]]] = self.manifest["domains"]
            self.domains = list(self.counts)
            self.tokenizer_digest = str(described["digest"])
            self.vocab_size, self.eos_id = int(described["vocab_size"]), int(described["eos_id"])
            for name, splits in self.counts.items():
                for split in SPLITS:
                    int(splits[split]["tokens"]), int(splits[split]["documents"])
                if (problem := check_domain_name(name)) is not None:
                    raise DataError(f"{where}: the domain name {name!r} {problem}; do not use this dataset")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: not the manifest of a dataset ({error!r}); make the dataset again") from error
        if version != VERSION:
            raise DataError(
                f"{where}: format version {version}, this megashear reads {VERSION}; make the dataset again"
            )
        if not self.domains:
            raise DataError(f"{where}: names no domain; make the dataset again")

    def _open_pair(self, domain: str, split: str) -> IndexedTokens:
        path = prefix(self.folder, domain, split)
        for suffix in (".bin", ".idx", ".crc"):
            if path.name + suffix not in self.manifest["files"]:
                raise DataError(f"{self.folder / NAME}: does not name {path.name + suffix}; make the dataset again")
        digests = read_block_digests(path, self.manifest["files"][path.name + ".crc"]["sha256"])
        opened, said = IndexedTokens(path, digests), self.counts[domain][split]
        if (len(opened.tokens), opened.documents) != (said["tokens"], said["documents"]):
            raise DataError(
                f"{opened.idx_path}: {len(opened.tokens)} tokens in {opened.documents} documents, the manifest says "
                f"{said['tokens']} in {said['documents']}; the file belongs to another dataset"
            )
        if split == "train" and not len(opened.tokens):
            raise DataError(
                f"{opened.bin_path}: the domain {domain!r} has no tokens to train on; leave it out or add text"
            )
        if len(opened.tokens) and opened.tokens[-1] != self.eos_id:
            raise DataError(
                f"{opened.bin_path}: ends in token {opened.tokens[-1]}, the manifest's end token is {self.eos_id}; "
                "the files do not belong together"
            )
        return opened

    def stream(self, domain: str, split: str = "train") -> CheckedArray:
        """All tokens of a domain's split back to back, uint16 or int32 [tokens], memory-mapped and read-only.

        Taking a slice of them raises DataError where the file is damaged there.
        """
        return self._pairs[domain, split].tokens

    def pair(self, domain: str, split: str = "train") -> IndexedTokens:
        """The opened pair of a domain's split: tokens and the documents' bounds."""
        return self._pairs[domain, split]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made this dataset, from its own copy; raises DataError where the copy is another one."""
        folder = self.folder / "tokenizer"
        named = {name: entry for name, entry in self.manifest["files"].items() if name.startswith("tokenizer/")}
        check_files(self.folder, {"files": named}, DataError)  # first: the libraries crash on damaged files
        if digest(tokenizer_file(folder)) == self.tokenizer_digest:
            tokenizer = load_tokenizer(folder, eos_id=self.eos_id)
            if tokenizer.vocab_size == self.vocab_size:
                return tokenizer
        raise DataError(f"{folder}: not the tokenizer that the manifest describes; restore the folder")

    def verify(self) -> None:
        """Compare every file's SHA-256, and the tokenizer, with the manifest: reads all. Raises DataError by file."""
        check_files(self.folder, self.manifest, DataError, digests=True)
        self.tokenizer()

    def digest(self) -> str:
        """SHA-256 of the manifest file: names this dataset, contents included (for checkpoints)."""
        return digest(self.folder / NAME)
