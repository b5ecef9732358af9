import pytest

from tools.bench import data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The benchmark's data, made small."""
    monkeypatch.setattr(data, "STREAM", 1 << 20)
    monkeypatch.setattr(data, "SAMPLES", 20)
    data.make_data(tmp_path / "d", 1000)
    return tmp_path / "d"


def test_every_form_of_every_case_measures(folder):
    """The peers too; both write the same index."""
    pytest.importorskip("megatron.core.datasets.gpt_dataset")
    for case, forms in data.FORMS.items():
        if case != "resume":
            for form in forms:
                found = data.measure(folder, case, form, 1000)
                assert found["value"] > 0 and found["mib"] >= 0, (case, form)
    assert (folder / "ours.idx").read_bytes() == (folder / "theirs.idx").read_bytes()


def test_too_few_rounds_and_a_folder_that_is_there(tmp_path, monkeypatch, capsys):
    for words in (["--rounds", "3"], []):
        monkeypatch.setattr("sys.argv", ["data.py", str(tmp_path), *words])
        with pytest.raises(SystemExit):
            data.main()
    error = capsys.readouterr().err
    assert "--rounds must be 7 or more" in error and "is there already" in error
