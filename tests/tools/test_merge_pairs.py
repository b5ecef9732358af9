import numpy as np
import pytest

from megashear.dataset.indexed import IndexedTokens, IndexedWriter
from tools.merge_pairs import main


@pytest.fixture
def prefix(tmp_path):
    """A pair of ten documents."""
    with IndexedWriter(tmp_path / "p", np.dtype(np.uint16)) as writer:
        for number in range(10):
            writer.add_document(np.full(3, number))
    return str(tmp_path / "p")


def test_together_and_apart(tmp_path, prefix, capsys):
    assert main([str(tmp_path / "twice"), prefix, prefix]) == 0
    assert IndexedTokens(tmp_path / "twice").documents == 20
    assert main([str(tmp_path / "cut"), str(tmp_path / "twice"), "--cut", "8"]) == 0
    assert [IndexedTokens(tmp_path / f"cut.{n}").documents for n in range(3)] == [8, 8, 4]
    assert "cut.2.bin: 4 documents, 12 tokens" in capsys.readouterr().out


def test_errors_are_one_message(tmp_path, prefix, capsys):
    for code, message, words in (
        (3, "nowhere.bin: cannot be read", [str(tmp_path / "t"), "nowhere"]),
        (3, "p.bin: already there", [prefix, prefix]),
        (2, "--cut is at least 1", [str(tmp_path / "t"), prefix, "--cut", "0"]),
        (2, "cuts one pair", [str(tmp_path / "t"), prefix, prefix, "--cut", "5"]),
    ):
        assert main(words) == code
        error = capsys.readouterr().err
        assert error.startswith("merge_pairs: ") and message in error
