"""Blended stream of samples, and its domain weights (dynamic batch loading). Knows nothing of models."""
