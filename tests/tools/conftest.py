"""The data room's fixtures: a dataset folder and what it is made of."""

from helpers.dataset_fixtures import dataset, dataset_folder, sentencepiece_model

__all__ = ["dataset", "dataset_folder", "sentencepiece_model"]
