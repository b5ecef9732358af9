import itertools
import json
import os
import random
import re
import shutil

import pytest

from megashear.dataset.dataset_folder import SPLITS, Dataset, check_domain_name, prefix
from megashear.errors import DataError


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_a_dataset_says_of_itself(dataset, sentencepiece_model):
    assert dataset.domains == ["web", "книги 📚", "code"]
    assert (dataset.vocab_size, dataset.eos_id) == (500, 2)
    assert len(dataset.stream("web")) == 5000 and len(dataset.stream("web", "heldout")) == 700
    tokenizer = dataset.tokenizer()
    assert tokenizer.digest == dataset.tokenizer_digest
    assert (dataset.folder / "tokenizer" / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    assert dataset.pair("code").documents == dataset.counts["code"]["train"]["documents"]
    dataset.verify()


def test_streams_cannot_be_written(dataset):
    with pytest.raises(ValueError):
        dataset.stream("web")[:10][0] = 1
    with pytest.raises(TypeError):
        dataset.stream("web")[0] = 1


def test_every_file_missing_cut_or_grown_is_refused_by_name(dataset_folder):
    files = [p for p in dataset_folder.rglob("*") if p.is_file()]
    assert len(files) == 3 * len(SPLITS) * 3 + 2
    for path in files:
        content = path.read_bytes()
        for change in (None, content[:-2], content + b"x", b""):
            path.unlink(missing_ok=True)
            if change is not None:
                path.write_bytes(change)
            with pytest.raises(DataError, match=path.name):
                Dataset.open(dataset_folder)
        path.write_bytes(content)
    Dataset.open(dataset_folder).verify()


def test_a_flipped_bit_is_found_by_verify(dataset_folder):
    for path in [p for p in dataset_folder.rglob("*") if p.is_file() and p.name != "manifest.json"]:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=path.name):
            Dataset.open(dataset_folder).verify()
        path.write_bytes(content)


def test_swapped_domains_are_found(dataset_folder):
    for suffix in (".bin", ".idx"):
        web, code = dataset_folder / f"web.train{suffix}", dataset_folder / f"code.train{suffix}"
        os.rename(web, dataset_folder / "aside")
        os.rename(code, web)
        os.rename(dataset_folder / "aside", code)
    with pytest.raises(DataError, match="train"):
        Dataset.open(dataset_folder)


@pytest.mark.parametrize("suffixes", [(".bin",), (".bin", ".idx"), (".bin", ".idx", ".crc")])
def test_swapped_domains_of_one_size_are_found_by_digest(tmp_path, sentencepiece_model, write_dataset, suffixes):
    """R19: the same sizes and counts everywhere; the other domain's tokens are never returned."""
    folders = [write_dataset(tmp_path / str(n), sentencepiece_model, {"web": (40, 40)}, seed=n) for n in range(20)]
    counts = [Dataset.open(folder).counts["web"] for folder in folders]
    one, other = next(pair for pair in itertools.combinations(range(20), 2) if counts[pair[0]] == counts[pair[1]])
    for suffix in suffixes:
        shutil.copyfile(folders[other] / f"web.train{suffix}", folders[one] / f"web.train{suffix}")
    with pytest.raises(DataError, match=r"web\.train"):
        Dataset.open(folders[one]).stream("web")[0:5]


def test_five_hundred_hostile_names_stay_in_the_folder(tmp_path, dataset_folder):
    """R18: whatever a shard or a manifest names, no path outside of the folder is touched."""
    dice = random.Random(0)
    atoms = ["..", "/", "\\", "~", ".", "a", "\0", "\n", "%2e%2e", "／", "․․", "C:", " ", "\u202e", "$(id)", "\ud800"]
    whole = (dataset_folder / "manifest.json").read_bytes()
    for _ in range(500):
        name = "".join(dice.choices(atoms, k=dice.randrange(1, 7)))
        if check_domain_name(name) is None:
            path = prefix(tmp_path, name, "train").resolve()
            assert path.parent == tmp_path.resolve() and path.name == f"{name}.train"
        for change in (
            lambda content, name=name: content["domains"].update({name: content["domains"].pop("web")}),
            lambda content, name=name: content["files"].update({name: content["files"].pop("web.train.bin")}),
        ):
            edit_manifest(dataset_folder, change)
            with pytest.raises(DataError, match=re.escape(str(dataset_folder))):
                Dataset.open(dataset_folder)
            (dataset_folder / "manifest.json").write_bytes(whole)


def test_another_tokenizer_is_refused(dataset_folder, tokenizer_json):
    (dataset_folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    with pytest.raises(DataError, match="not the tokenizer"):
        Dataset.open(dataset_folder).tokenizer()


@pytest.mark.parametrize("name", ["../out", "a/b", "/etc/x", ".hidden", "a\\b", "a\0b", "a\nb", "", " ", "x" * 300])
def test_a_name_that_is_no_file_name_is_refused(dataset_folder, name):
    assert check_domain_name(name) is not None
    edit_manifest(dataset_folder, lambda content: content["domains"].update({name: content["domains"]["web"]}))
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset.open(dataset_folder)


@pytest.mark.parametrize("name", ["CommonCrawl", "книги", "📚 books", "a.b-c_d", "C4 (2019)"])
def test_names_in_any_script_are_fine(name):
    assert check_domain_name(name) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("domains"),
        lambda content: content.pop("tokenizer"),
        lambda content: content.update(domains=[1, 2]),
        lambda content: content.update(domains={}),
        lambda content: content.update(version=99),
        lambda content: content["domains"]["web"].pop("train"),
        lambda content: content["domains"]["web"]["train"].update(tokens=4999),
        lambda content: content["domains"]["web"]["train"].update(documents="many"),
        lambda content: content["tokenizer"].update(vocab_size=None),
        lambda content: content["files"].pop("web.train.bin"),
        lambda content: content["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0"}}),
    ],
)
def test_a_manifest_that_is_none_is_refused(dataset_folder, change):
    edit_manifest(dataset_folder, change)
    with pytest.raises(DataError, match=r"manifest\.json|web\.train"):
        Dataset.open(dataset_folder)


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: not found"):
        Dataset.open(tmp_path)


def test_an_empty_domain_is_refused(tmp_path, sentencepiece_model, write_dataset):
    folder = write_dataset(tmp_path / "d", sentencepiece_model, {"web": (100, 10), "none": (0, 0)})
    with pytest.raises(DataError, match="'none' has no tokens"):
        Dataset.open(folder)


def mutate(content: bytes, dice: random.Random) -> bytes:
    """Cut, grow, flip a bit, blank a run, or drop a byte."""
    changed, at = bytearray(content), dice.randrange(len(content))
    kind = dice.randrange(5)
    if kind == 0:
        del changed[at:]
    elif kind == 1:
        changed += bytes(dice.randrange(1, 99))
    elif kind == 2:
        changed[at] ^= 1 << dice.randrange(8)
    elif kind == 3:
        changed[at : at + 16] = bytes(len(changed[at : at + 16]))
    else:
        del changed[at]
    return bytes(changed)


def test_a_thousand_mutations_none_is_silent(dataset_folder):
    """Every one is refused by name, but those that leave the manifest's meaning (a blank less)."""
    files = sorted(p for p in dataset_folder.rglob("*") if p.is_file())
    dice = random.Random(0)
    for _ in range(1000):
        path = dice.choice(files)
        content = path.read_bytes()
        changed = mutate(content, dice)
        path.write_bytes(changed)
        try:
            Dataset.open(dataset_folder).verify()
        except DataError as error:
            assert str(dataset_folder) in str(error)
        else:
            same = changed == content
            assert same or (path.name == "manifest.json" and json.loads(changed) == json.loads(content)), path
        path.write_bytes(content)


def test_the_manifests_own_numbers_are_checked(dataset_folder):
    for key, value in (("eos_id", 3), ("vocab_size", 501), ("digest", "0" * 64)):
        content = (dataset_folder / "manifest.json").read_bytes()
        edit_manifest(dataset_folder, lambda manifest, key=key, value=value: manifest["tokenizer"].update({key: value}))
        with pytest.raises(DataError):
            Dataset.open(dataset_folder).verify()
        (dataset_folder / "manifest.json").write_bytes(content)
