"""The tiny run of `run_stages`."""

from run_stages.conftest import tiny, unbroken_folder  # noqa: F401
