"""One rank for the whole room, and the tiny dataset."""

from model.conftest import alone  # noqa: F401
from run_stages.conftest import tiny  # noqa: F401
