import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megashear.dataset.tokenizer import load_tokenizer
from megashear.errors import DataError

ODD = ["", " ", "  a  b ", "\n\n\tx", "naïve 🐍 日本", "a\0b", "▁", "<s></s>", "é" * 300]


def test_sentencepiece_ids_are_the_librarys(sentencepiece_model, texts):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (500, 2, "tokenizer.model")
    for text in texts[:200] + ODD:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == library.encode(text)
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x")) == "def f(x):\n    return x"


def test_hugging_face_ids_are_the_librarys(tokenizer_json, texts):
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    tokenizer = load_tokenizer(tokenizer_json)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (400, 0)
    assert [p.name for p in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]
    for text in texts[:200] + ODD:
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(" naïve 🐍")) == " naïve 🐍"


def test_a_folder_with_both_gives_the_json(tmp_path, sentencepiece_model, tokenizer_json):
    for path in (sentencepiece_model, tokenizer_json, tokenizer_json.with_name("tokenizer_config.json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.name == "tokenizer.json"
    assert {p.name for p in tokenizer.files} == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert tokenizer.digest == load_tokenizer(tokenizer_json).digest != load_tokenizer(sentencepiece_model).digest


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("tokenizer_config.json", {"eos_token": "a"}, "a"),
        ("special_tokens_map.json", {"eos_token": {"content": "b"}}, "b"),
        ("generation_config.json", {"eos_token_id": [7, 8]}, 7),
        ("config.json", {"eos_token_id": 9}, 9),
    ],
)
def test_where_the_end_token_is_found(tmp_path, tokenizer_json, name, settings, expected):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json.read_bytes())
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(path)
    (tmp_path / name).write_text(json.dumps(settings))
    found = load_tokenizer(path).eos_id
    library = tokenizers.Tokenizer.from_file(str(path))
    assert found == (library.token_to_id(expected) if isinstance(expected, str) else expected)
    assert load_tokenizer(path, eos_id=3).eos_id == 3


def test_files_that_are_no_tokenizers(tmp_path, tokenizer_json):
    with pytest.raises(DataError, match="holds neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="not found"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\0nonsense")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_an_end_token_outside_of_the_vocabulary(sentencepiece_model):
    with pytest.raises(DataError, match="outside of its 500 ids"):
        load_tokenizer(sentencepiece_model, eos_id=500)
