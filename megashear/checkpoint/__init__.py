"""Checkpoints of a training phase: complete or absent, verified by digest, loadable on another layout."""
