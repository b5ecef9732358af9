"""Preprocess text shards into a dataset folder."""
