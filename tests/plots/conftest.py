"""Fixtures of the plots tests."""

from helpers.synthetic_run import published_run, small_pictures  # noqa: F401
