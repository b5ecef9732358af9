"""Plots of runs and datasets. Does not import torch."""
