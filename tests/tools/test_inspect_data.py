import pytest

from megashear.dataset.dataset_folder import Dataset
from tools.inspect_data import main


@pytest.fixture
def show(dataset_folder, capsys):
    """Run the tool on the dataset; returns what it printed."""

    def run(*words: str, status: int = 0) -> str:
        assert main([str(dataset_folder), *words]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out.removesuffix("\n")

    return run


def test_the_domains(show, dataset):
    lines = show().splitlines()
    assert len(lines) == 6 and lines[0].startswith("web: train ") and lines[0].endswith(" 5,000 tokens")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents(show, dataset: Dataset, split):
    ids = dataset.pair("книги 📚", split).document(3)
    tokens = show("книги 📚", "--document", "3", "--split", split, "--tokens")
    assert tokens == " ".join(map(str, ids.tolist()))
    text = show("книги 📚", "--document", "3", "--split", split)
    ends = ids.tolist().count(dataset.eos_id)
    assert text.count("⏹") == ends and text.startswith(dataset.tokenizer().decode(ids[:1]).strip("\n")[:1])


def test_a_sample_is_what_training_reads(show, dataset: Dataset):
    tokens = show("web", "--sample", "2", "--sequence-length", "16", "--tokens")
    assert tokens == " ".join(map(str, dataset.stream("web")[32:49].tolist()))


@pytest.mark.parametrize(
    "words, message",
    [
        (["books"], "no domain 'books'; there are web, книги 📚, code"),
        (["web", "--document", "100000"], "--document 100000: there are"),
        (["web", "--document", "-1"], "--document -1"),
        (["web", "--sample", "312", "--sequence-length", "16"], "--sample 312: there are 312"),
        (["web", "--sample", "0", "--sequence-length", "0"], "--sequence-length is at least 1"),
    ],
)
def test_what_is_not_there(show, words, message):
    assert message in show(*words, status=2)
