"""Plots of runs and datasets."""
