"""Fixtures of the report tests."""

from helpers.synthetic_run import published_run, small_pictures  # noqa: F401
