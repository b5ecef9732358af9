"""Fixtures of the dataset tests."""

from helpers.dataset_fixtures import (  # noqa: F401
    dataset,
    dataset_folder,
    sentencepiece_model,
    texts,
    tokenizer_json,
    write_dataset,
)
