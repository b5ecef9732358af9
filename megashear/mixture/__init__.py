"""The blended stream of samples and its domain weights (dynamic batch loading)."""
