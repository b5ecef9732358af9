"""Small real parts for the data room: a SentencePiece model, a tokenizer.json, texts, a dataset folder."""

import email
import inspect
import json
import pathlib
import pydoc
from pathlib import Path

import pytest

from helpers.inputs import make_random_dataset, make_tokenizer
from megashear.dataset.dataset_folder import Dataset

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
    folder = tmp_path_factory.mktemp("huggingface")
    make_tokenizer(folder / "tokenizer.json", 400, [TEXT])
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    return folder / "tokenizer.json"


@pytest.fixture
def write_dataset():
    """The function that writes a dataset folder of random ids."""
    return make_random_dataset


@pytest.fixture
def dataset_folder(tmp_path, sentencepiece_model) -> Path:
    """Three domains, one of them with a name outside of ASCII."""
    return make_random_dataset(
        tmp_path / "dataset", sentencepiece_model, {"web": (5000, 700), "книги 📚": (1200, 300), "code": (333, 90)}
    )


@pytest.fixture
def dataset(dataset_folder) -> Dataset:
    """`dataset_folder`, opened."""
    return Dataset.open(dataset_folder)
