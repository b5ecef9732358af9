import pytest

from dataset.test_verify_dataset import good, make
from tools.verify_data import main


@pytest.fixture
def folder(tmp_path, sentencepiece_model):
    return make(tmp_path / "d", sentencepiece_model, {("web", "train"): good(400, 5), ("web", "heldout"): good(9, 6)})


def test_status_and_lines(folder, capsys):
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("holds: ") for line in lines)
    assert main([str(folder), "--sample", "0.5", "--seed", "3"]) == 0
    path = folder / "web.train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    for sample in ([], ["--sample", "0.9"]):
        assert main([str(folder), *sample]) == 3
        assert "web.train.bin" in capsys.readouterr().err


def test_errors(tmp_path, capsys):
    assert main([str(tmp_path)]) == 3 and main([str(tmp_path), "--sample", "0"]) == 2
    assert "manifest.json: not found" in capsys.readouterr().err
