"""The compiled encoder against the libraries: ids identical on every text, for models of many kinds.

`pytest tests/dataset/test_bpe.py -m slow` is the longer proof.
"""

import importlib.util
import json
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers

from helpers.dataset_fixtures import PIECES, TEXT
from megashear.dataset.bpe import read_model
from megashear.dataset.tokenizer import load_tokenizer
from megashear.preprocess.build_dataset import Preprocessing, preprocess, table
from megashear.preprocess.heldout_split import HeldOutRule
from megashear.preprocess.merge_parts import Merging

BUILT = importlib.util.find_spec("megashear._csrc") is not None
needs_kernels = pytest.mark.skipif(not BUILT, reason="the kernels are not built")

LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
USER_DEFINED = ["<tag>", "<tag>>", "\n", "▁▁▁", "x▁y", "日本", "_", "self.", "u v"]
SERVED = {
    "llama": LLAMA,
    "user-defined": LLAMA | {"user_defined_symbols": USER_DEFINED},
    "unknown": LLAMA | {"byte_fallback": False, "character_coverage": 0.98},
    "across words": LLAMA | {"split_by_whitespace": False, "vocab_size": 800},
    "no prefix": LLAMA | {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "split_digits": True},
    "control": LLAMA | {"control_symbols": ["<sep>"], "split_by_unicode_script": False, "max_sentencepiece_length": 30},
}
NOT_SERVED = {
    "normalises": LLAMA | {"normalization_rule_name": "nmt_nfkc"},
    "removes extra spaces": LLAMA | {"remove_extra_whitespaces": True},
    "not a BPE": LLAMA | {"model_type": "unigram"},
    "spaces are treated": LLAMA | {"treat_whitespace_as_suffix": True},
    "single character": LLAMA | {"control_symbols": ["§"]},
}
# Joined at random into texts: spaces and what looks like one, control characters, scripts that no piece knows, parts of
# composed characters, literal special pieces, pieces that overlap. Cut at the bars.
BARRED = (
    " |  |    |▁|▁▁|\t|\n|\n\n|\r\n|\0|\x01|\x7f|\x85|\xa0|\u200b|\u2028|\u3000|\ufeff|\ufffd|\ufffe|\U0010ffff|\ue000|"
    "é|e\u0301|ﬁ|İ|ß|日本|日|語|한국|ᚠ|𒀀|🐍|👩\u200d👧|<s>|</s>|<unk>|<0x0A>|<0xE2>|<tag>|<tag>>|<ta|<sep>|§|_|"
    "x y|x▁y|u v|self.|self|def |return|aaaa|abab|0|2024|!|->|('|__init__"
)
NASTY = BARRED.split("|")
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(NASTY), max_size=30).map("".join),
    st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=3), st.sampled_from(PIECES)), max_size=8).map("".join),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT[:120_000] + "日本語 naïve\n" * 30, encoding="utf-8")
    return folder


def train(folder, kind):
    """The SentencePiece model of one kind, made when it is first asked for."""
    path = folder / f"{kind.replace(' ', '_')}.model"
    if not path.exists():
        fixed = {"input": str(folder / "text.txt"), "model_prefix": str(path.with_suffix("")), "num_threads": 1}
        options = {"vocab_size": 600, "model_type": "bpe", "minloglevel": 2} | (SERVED | NOT_SERVED)[kind]
        sentencepiece.SentencePieceTrainer.train(**fixed, **options)
    return path


@pytest.fixture(scope="module")
def llama_json(tmp_path_factory):
    """A tokenizer.json as LLaMA 2's: spaces escaped, a space before, bytes for unknown characters."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([word for piece in PIECES[:400] for word in piece.split(" ")], trainer)
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    path.write_text(json.dumps(content))
    (path.parent / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


def check(path, served_by, library, long=False):
    """Ids of the tokenizer and of the library's own `encode` on fixed and on random texts."""
    tokenizer = load_tokenizer(path)
    assert served_by in tokenizer.served_by

    def same(text):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == library(text), repr(text[:200])

    for text in ["", *NASTY, "".join(NASTY), " ".join(NASTY), *PIECES[:40], TEXT[:20_000], "é" * 300, "a" * 5000]:
        same(text)
    same("".join(TEXT[:20_000].split()))  # one long word
    same("".join(random.Random(1).choices("abcdefgh <_", k=5000)))
    given(TEXTS)(settings(max_examples=5_000 if long else 120, deadline=None, database=None)(same))()


@needs_kernels
@pytest.mark.parametrize("kind", SERVED)
def test_sentencepiece_models_that_are_served(folder, kind):
    path = train(folder, kind)
    check(path, "compiled encoder", sentencepiece.SentencePieceProcessor(model_file=str(path)).encode)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVED)
def test_sentencepiece_models_that_are_served_at_length(folder, kind):
    path = train(folder, kind)
    check(path, "compiled encoder", sentencepiece.SentencePieceProcessor(model_file=str(path)).encode, long=True)


@needs_kernels
@pytest.mark.parametrize("reason", NOT_SERVED)
def test_sentencepiece_models_that_the_library_serves(folder, reason):
    path = train(folder, reason)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.served_by.startswith("library (") and reason in tokenizer.served_by
    for text in [*NASTY, "".join(NASTY).replace("§", ""), "", *PIECES[:10]]:
        if text != "§":  # the library itself refuses a control piece in a text
            assert tokenizer.encode(text).tolist() == library.encode(text)


@needs_kernels
def test_tokenizer_json_of_llama(llama_json):
    library = Tokenizer.from_file(str(llama_json))
    check(llama_json, "compiled encoder", lambda text: library.encode(text, add_special_tokens=False).ids)


@needs_kernels
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "pre-tokeniser"),
        ({"normalizer": {"type": "NFKC"}}, "normaliser"),
        ({"model": {"ignore_merges": True}}, "plain BPE"),
        ({"model": {"byte_fallback": False}}, "plain BPE"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "plain BPE"),
        ({"model": {"dropout": 0.0}}, ""),
    ],
)
def test_tokenizer_json_that_the_library_serves(llama_json, tmp_path, change, reason):
    content = json.loads(llama_json.read_text())
    content["model"] |= change.pop("model", {})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | change))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    library, tokenizer = Tokenizer.from_file(str(path)), load_tokenizer(path)
    assert reason in tokenizer.served_by and tokenizer.served_by.startswith("library" if reason else "compiled")
    for text in [*NASTY, *PIECES[:10]]:
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


@needs_kernels
def test_words_that_push_each_other_out_of_the_cache(sentencepiece_model):
    random_ = random.Random(0)
    words = ["".join(random_.choices("etaoinshrdlu", k=random_.choice([5, 15, 16, 40]))) for _ in range(20_000)]
    text = " ".join([*words, *words[::3], *words])
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.encode(text).tolist() == library.encode(text)
    assert tokenizer.encode(text[::-1]).tolist() == library.encode(text[::-1])


@needs_kernels
def test_threads_share_a_tokenizer(sentencepiece_model, texts):
    tokenizer = load_tokenizer(sentencepiece_model)
    expected = [load_tokenizer(sentencepiece_model).encode(text).tolist() for text in texts[:300]]
    with ThreadPoolExecutor(4) as pool:
        assert [ids.tolist() for ids in pool.map(tokenizer.encode, texts[:300])] == expected


@needs_kernels
def test_a_lone_surrogate_is_refused(sentencepiece_model):
    with pytest.raises(UnicodeEncodeError):
        load_tokenizer(sentencepiece_model).encode("a\ud800b")


def test_the_library_serves_where_the_reference_is_asked_for(sentencepiece_model, texts, monkeypatch):
    monkeypatch.setenv("MEGASHEAR_KERNELS", "reference")
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.served_by == "library (MEGASHEAR_KERNELS=reference)"
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert tokenizer.encode(texts[0]).tolist() == library.encode(texts[0])


@needs_kernels
def test_a_dataset_does_not_depend_on_what_encodes(sentencepiece_model, texts, tmp_path, monkeypatch):
    (tmp_path / "shard.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:300]))
    written = []
    for environment, said in (("", "tokenised by the compiled encoder"), ("reference", "by the library (MEGASHEAR_")):
        monkeypatch.setenv("MEGASHEAR_KERNELS", environment)
        output = tmp_path / f"dataset {environment}"
        job = Preprocessing([str(tmp_path / "shard.jsonl")], sentencepiece_model, output, Merging(HeldOutRule()))
        assert said in table(preprocess(job), job.merging.heldout)
        written.append({path.name: path.read_bytes() for path in output.glob("*.bin")})
    assert len(written[0]) == 2 and written[0] == written[1]


def test_what_a_model_file_says(folder):
    path = train(folder, "user-defined")
    library, model = sentencepiece.SentencePieceProcessor(model_file=str(path)), read_model(path.read_bytes())
    assert [piece.text.decode() for piece in model.pieces] == [library.id_to_piece(i) for i in range(len(library))]
    assert [piece.score for piece in model.pieces] == [library.get_score(i) for i in range(len(library))]
    assert [piece.type == 3 for piece in model.pieces] == [library.is_control(i) for i in range(len(library))]
    assert [piece.type == 6 for piece in model.pieces] == [library.is_byte(i) for i in range(len(library))]


@given(st.binary(max_size=60), st.integers(0, 2000))
@settings(max_examples=200, deadline=None, database=None)
def test_a_damaged_model_file_is_a_value_error_or_is_read(noise, cut):
    good = b"".join(b"\x0a\x08\x0a\x01a\x15" + struct.pack("<f", float(i)) for i in range(20))
    for content in (noise, good[:cut], good[:cut] + noise):
        try:
            read_model(content)
        except ValueError as error:
            assert str(error)
