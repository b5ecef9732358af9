"""Byte-pair encoding by the compiled encoder (csrc/tokenize): which model files it serves, and their rules for it.

Served are SentencePiece BPE models and `tokenizer.json` files whose text is left as it is but for spaces, as LLaMA's
are. Every field that could change an id is looked at; what is not known to be harmless is refused with a reason, and
the library serves in its place. Read next: csrc/tokenize/tokenize.h (the algorithm), `sentencepiece_model.py`.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megashear.data import sentencepiece_model as proto

SPACE = "\u2581"
LARGEST = 1 << 22  # ids; tables have a row for each


class NotServed(ValueError):
    """Why the compiled encoder cannot take a model; the library serves."""


class CompiledEncoder(Protocol):
    """The compiled encoder of one model."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens]; raises UnicodeEncodeError where it holds a lone surrogate."""


@dataclass(frozen=True)
class BpeRules:
    """What decides about ids.

    `texts`: of every id, empty where it is never merged nor found as a character (control pieces, bytes); `ranks`: of
    every id, for models that join any two neighbours making a piece, least first; or `merges`: ids of left, right,
    then rank and merged id; `wholes`: ids of user-defined pieces; `bytes`: ids of the 256 bytes, or none where unknown
    characters give `unknown`; `prefix`: a space is put before the text; `apart`: texts that hold one of these strings
    go to the library.
    """

    texts: list[str]
    ranks: list[int] = field(default_factory=list)
    merges: list[tuple[int, int, int, int]] = field(default_factory=list)
    wholes: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    unknown: int = 0
    prefix: bool = True
    apart: list[str] = field(default_factory=list)


def compile_rules(rules: BpeRules) -> CompiledEncoder:
    """The compiled encoder of some rules; raises NotServed where the kernels are not built or not wanted."""
    if os.environ.get("MEGASHEAR_KERNELS") == "reference":
        raise NotServed("MEGASHEAR_KERNELS=reference")
    if importlib.util.find_spec("megashear._csrc") is None:
        raise NotServed("the kernels are not built")
    try:
        made = importlib.import_module("megashear._csrc").BpeEncoder
    except (ImportError, AttributeError) as error:
        raise NotServed(f"the kernels cannot be loaded ({error})") from error
    merges = np.array(rules.merges, dtype=np.int32).reshape(-1, 4)
    encoder: CompiledEncoder = made(
        rules.texts, rules.ranks, merges, rules.wholes, rules.bytes, rules.unknown, rules.prefix
    )
    return encoder


# ---- SentencePiece ----


def sentencepiece_rules(content: bytes) -> BpeRules:
    """The rules of a `tokenizer.model`; raises NotServed."""
    try:
        model = proto.read_model(content)
        texts = [piece.text.decode("utf-8") for piece in model.pieces]
    except ValueError as error:
        raise NotServed(f"not read ({error})") from error
    check_settings(model)
    kinds = [piece.type for piece in model.pieces]
    if not set(kinds) <= {proto.NORMAL, proto.UNKNOWN, proto.CONTROL, proto.USER_DEFINED, proto.BYTE}:
        raise NotServed("it has unused pieces")
    merged = (proto.NORMAL, proto.USER_DEFINED)
    if any(len(text) < 2 and kind not in merged for text, kind in zip(texts, kinds, strict=True)) or "" in texts:
        raise NotServed("a control piece has a single character")
    if any("\0" in text for text in texts):
        raise NotServed("a piece holds a zero byte")
    scores = [piece.score for piece in model.pieces]
    if any(score != score for score in scores):
        raise NotServed("a score is not a number")
    rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    found = {text: i for i, text in enumerate(texts) if kinds[i] == proto.BYTE}
    # Spaces are escaped before pieces are looked up, so those that hold one are never found.
    return BpeRules(
        texts=[t if kind in merged and " " not in t else "" for t, kind in zip(texts, kinds, strict=True)],
        ranks=[rank_of[score] for score in scores],
        wholes=[i for i, kind in enumerate(kinds) if kind == proto.USER_DEFINED and " " not in texts[i]],
        bytes=byte_ids(found) if model.trainer[proto.BYTE_FALLBACK] else [],
        unknown=kinds.index(proto.UNKNOWN),
        prefix=bool(model.normalizer[proto.DUMMY_PREFIX]),
    )


def check_settings(model: proto.SentencePieceModel) -> None:
    """Raise NotServed unless a SentencePiece model's text is left as it is but for escaped spaces."""
    if model.trainer[proto.MODEL_TYPE] != proto.BPE:
        raise NotServed("not a BPE model")
    if model.trainer[proto.SUFFIX] or not model.normalizer[proto.ESCAPE_SPACES]:
        raise NotServed("its spaces are treated in another way than LLaMA's")
    if model.normalizer[proto.REMOVE_SPACES]:
        raise NotServed("it removes extra spaces")
    if model.normalizer[proto.CHARACTER_MAP]:
        raise NotServed("it normalises text")
    if model.unknown:
        raise NotServed(f"it has fields that are not known: {', '.join(sorted(model.unknown))}")


def byte_ids(found: dict[str, int]) -> list[int]:
    """Ids of `<0x00>` to `<0xFF>`; raises NotServed where one is missing."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if any(name not in found for name in names):
        raise NotServed("it has no piece for some bytes")
    return [found[name] for name in names]


# ---- tokenizer.json ----

LLAMA_NORMALIZERS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
MODEL_DEFAULTS = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": True,
    "ignore_merges": False,
}
MODEL_FIELDS = {*MODEL_DEFAULTS, "unk_token", "fuse_unk", "vocab", "merges"}


def tokenizer_json_rules(settings: dict[str, Any]) -> BpeRules:
    """The rules of a `tokenizer.json`, parsed; raises NotServed."""
    model = settings.get("model") or {}
    normalizer = settings.get("normalizer") or {}
    if normalizer != {"type": "Sequence", "normalizers": LLAMA_NORMALIZERS} or settings.get("pre_tokenizer"):
        raise NotServed("its normaliser or pre-tokeniser is not LLaMA 2's")
    if not set(model) <= MODEL_FIELDS or any(
        (model.get(name) or False) != (wanted or False) for name, wanted in MODEL_DEFAULTS.items()
    ):
        raise NotServed("not a plain BPE model with byte fallback")
    vocabulary: dict[str, int] = model["vocab"]
    tokens = settings.get("added_tokens") or []
    if any(not t["content"] or (t["normalized"] and not {" ", SPACE}.isdisjoint(t["content"])) for t in tokens):
        raise NotServed("an added token holds a space or nothing")
    # With all bytes there no character is unknown.
    bytes_ = byte_ids(vocabulary)
    if (size := max(vocabulary.values()) + 1) > LARGEST:
        raise NotServed(f"an id is beyond {LARGEST}")
    texts = [""] * size
    for text, i in vocabulary.items():
        texts[i] = "" if " " in text else text  # spaces are escaped before
    for i in bytes_:
        texts[i] = ""
    merges = ranked_merges(model["merges"], vocabulary, texts)
    return BpeRules(texts, merges=merges, bytes=bytes_, apart=[token["content"] for token in tokens])


def ranked_merges(pairs: list[Any], vocabulary: dict[str, int], texts: list[str]) -> list[tuple[int, int, int, int]]:
    """Left, right, rank and merged id of pairs of texts in the order of their rank; raises NotServed."""
    merges = []
    for rank, pair in enumerate(pairs):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ids = vocabulary[left], vocabulary[right], rank, vocabulary[left + right]
        if not texts[ids[0]] or not texts[ids[1]]:
            raise NotServed("a byte or a space takes part in a merge")
        merges.append(ids)
    if len({ids[:2] for ids in merges}) != len(merges):
        raise NotServed("a merge stands there twice")
    return merges
