import numpy as np
import pytest

from megashear.preprocess.dataset_report import describe, report_text, span


@pytest.fixture
def reports():
    return [
        describe("web", np.array([1, 2, 3, 4, 7, 8, 1000]), np.array([4, 8, 12, 16, 28, 32, 4000]), 2),
        describe("книги", np.array([5]), np.array([10]), 0),
    ]


def test_counts_are_of_the_documents(reports):
    web = reports[0]
    assert (web.documents, web.tokens, web.bytes, web.duplicates) == (7, 1025, 4100, 2)
    assert web.documents_L.tolist() == [1, 2, 2, 1, 0, 0, 0, 0, 0, 1]
    assert web.tokens_L.tolist() == [1, 5, 11, 8, 0, 0, 0, 0, 0, 1000]


def test_lengths_at_the_edges_of_bins():
    powers = np.array([2**i + d for i in range(1, 31) for d in (-1, 0)], dtype=np.int64)
    documents_L = describe("x", powers, powers, 0).documents_L
    expected = np.zeros(31, int)
    for length in powers.tolist():
        expected[length.bit_length() - 1] += 1
    assert documents_L.tolist() == expected.tolist()


def test_the_text(reports):
    text = report_text(reports, dropped=False)
    lines = text.splitlines()
    assert lines[1].split() == ["web", "7", "1,025", "4,100", "0.2500", "4-7", "512-1023", "2"]
    assert lines[2].split() == ["книги", "1", "5", "10", "0.5000", "4-7", "4-7", "0"]
    assert "--drop-duplicates leaves them out" in text
    bars = [line for line in lines if "of tokens" in line and "-" in line]
    assert bars[0].split() == ["2-3", "#" * 40, "2", "0.5%", "of", "tokens"]
    assert span(0) == "1" and span(6) == "64-127"


def test_the_picture(reports, tmp_path):
    from megashear.plots.length_plots import draw_lengths
    from megashear.plots.plot_style import save

    for name in ("a.png", "b.png"):
        save(draw_lengths(reports), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
