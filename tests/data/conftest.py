"""Small real parts for the data room: a SentencePiece model, a tokenizer.json, texts, a dataset folder."""

import email
import inspect
import json
import pathlib
import pydoc
from pathlib import Path

import numpy as np
import pytest

from megashear.data.indexed import IndexedWriter, token_dtype
from megashear.data.manifest import SPLITS, Dataset, prefix, write_dataset_manifest
from megashear.data.tokenizer import load_tokenizer
from megashear.files.atomic import atomic_folder

TEXT = "\n".join(inspect.getsource(module) for module in (pathlib, pydoc, json, email, inspect))
PIECES = [piece.strip("\n") + "\n" for piece in TEXT.split("\n\n") if len(piece.strip()) > 20]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some 1 500 documents of 20 to 3 000 characters: Python's own sources."""
    return PIECES


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    """A BPE model of 500 pieces with byte fallback and LLaMA's normalisation."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer.json of 400 ids; its tokenizer_config.json names `<end>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    return folder / "tokenizer.json"


def make_dataset(folder: Path, tokenizer_path: Path, tokens: dict[str, tuple[int, int]], seed: int = 0) -> Path:
    """A dataset folder of random ids: {domain: (train tokens, held-out tokens)}, documents of up to 50 tokens."""
    random = np.random.default_rng(seed)
    tokenizer = load_tokenizer(tokenizer_path)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    with atomic_folder(folder) as temporary:
        for domain, wanted in tokens.items():
            for split, total in zip(SPLITS, wanted, strict=True):
                with IndexedWriter(prefix(temporary, domain, split), token_dtype(tokenizer.vocab_size)) as writer:
                    while writer.tokens < total:
                        length = min(int(random.integers(1, 50)), total - writer.tokens)
                        ids = random.integers(0, tokenizer.vocab_size, length)
                        ids[-1] = tokenizer.eos_id
                        writer.add_document(ids)
                counted = {"tokens": writer.tokens, "documents": writer.documents}
                counts.setdefault(domain, {})[split] = counted
        (temporary / "tokenizer").mkdir()
        for file in tokenizer.files:
            (temporary / "tokenizer" / file.name).write_bytes(file.read_bytes())
        write_dataset_manifest(temporary, counts, tokenizer, {})
    return folder


@pytest.fixture
def write_dataset():
    """The function that writes a dataset folder of random ids."""
    return make_dataset


@pytest.fixture
def dataset_folder(tmp_path, sentencepiece_model) -> Path:
    """Three domains, one of them with a name outside of ASCII."""
    return make_dataset(
        tmp_path / "dataset", sentencepiece_model, {"web": (5000, 700), "книги 📚": (1200, 300), "code": (333, 90)}
    )


@pytest.fixture
def dataset(dataset_folder) -> Dataset:
    """`dataset_folder`, opened."""
    return Dataset.open(dataset_folder)
