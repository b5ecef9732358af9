"""Learned masks: hard concrete parameters, constraint, sparsity schedule, kept units, folding. Knows no models."""
