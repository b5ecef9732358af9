"""Checks and estimates of a run before it starts. Imports neither torch nor numpy."""
