"""Shards of text to a dataset folder."""
