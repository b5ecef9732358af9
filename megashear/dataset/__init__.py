"""Datasets on disk: indexed pairs, block digests, the dataset folder, tokenizers, verification."""
