"""Rules for the compiled BPE encoder (`csrc/tokenize`), read from tokenizer files.

Supported are SentencePiece BPE models and `tokenizer.json` files that change nothing but spaces, such as LLaMA's. Every
field that could change an id is inspected; what is not known to be harmless is refused, and the library encodes
instead. SentencePiece's normalisation settings are read from the file itself (protocol buffers' wire format, field
numbers of `sentencepiece_model.proto`), because the library does not expose them.
"""

import importlib.util
import os
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Fields of ModelProto, of NormalizerSpec and of TrainerSpec that decide about ids, and the ranges of those known.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
MODEL_TYPE, SUFFIX, BYTE_FALLBACK = 3, 24, 35
KNOWN = {"model": range(1, 6), "trainer": range(1, 56), "normalizer": range(1, 7), "piece": range(1, 4)}

Field = tuple[int, int | bytes]


class Piece(NamedTuple):
    """One piece: its text as UTF-8, its score (fp32) and its type (NORMAL, ...); its id is its place."""

    text: bytes
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in the order of their ids, the fields of trainer and normalizer by number with defaults filled in, and
    fields of later versions (or extensions), which could mean anything."""

    pieces: list[Piece]
    trainer: dict[int, int | bytes]
    normalizer: dict[int, int | bytes]
    unknown: set[str]


def read_model(content: bytes) -> SentencePieceModel:
    """Read a file's content; raises ValueError where it is not in the wire format."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {MODEL_TYPE: 1, SUFFIX: 0, BYTE_FALLBACK: 0}
    normalizer: dict[int, int | bytes] = {CHARACTER_MAP: b"", DUMMY_PREFIX: 1, REMOVE_SPACES: 1, ESCAPE_SPACES: 1}
    seen: dict[str, set[int]] = {"model": set(), "piece": set()}
    for number, value in fields(content):
        seen["model"].add(number)
        if number == PIECES:
            piece: dict[int, int | bytes] = {1: b"", 2: bytes(4), 3: NORMAL, **dict(fields(as_bytes(value)))}
            seen["piece"].update(piece)
            text, score, kind = as_bytes(piece[1]), as_bytes(piece[2]), as_number(piece[3])
            pieces.append(Piece(text, struct.unpack("<f", score)[0], kind))
        elif number in (TRAINER, NORMALIZER):
            (trainer if number == TRAINER else normalizer).update(fields(as_bytes(value)))
    seen |= {"trainer": set(trainer), "normalizer": set(normalizer)}
    unknown = {f"{name} {number}" for name, numbers in seen.items() for number in numbers if number not in KNOWN[name]}
    return SentencePieceModel(pieces, trainer, normalizer, unknown)


def as_number(value: int | bytes) -> int:
    """The value of a field that must be a number; raises ValueError."""
    if isinstance(value, bytes):
        raise ValueError("bytes where a number is due")
    return value


def as_bytes(value: int | bytes) -> bytes:
    """The value of a field that must have a length of its own; raises ValueError."""
    if isinstance(value, int):
        raise ValueError("a number where bytes are due")
    return value


def fields(content: bytes) -> list[Field]:
    """Number and value of every field: an int of a varint, else the bytes. Raises ValueError."""
    found: list[Field] = []
    place = 0
    while place < len(content):
        key, place = varint(content, place)
        if (kind := key & 7) == VARINT:
            value, place = varint(content, place)
            found.append((key >> 3, value))
            continue
        if kind == BYTES:
            length, place = varint(content, place)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} is unknown")
        if place + length > len(content):
            raise ValueError("a field is cut short")
        found.append((key >> 3, content[place : place + length]))
        place += length
    return found


def varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least first, and the place behind it; raises ValueError."""
    if content[place : place + 1] < b"\x80" and place < len(content):
        return content[place], place + 1  # nearly all are that short
    value = shift = 0
    while place < len(content) and shift < 64:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError("a number is cut short")


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
        model = read_model(content)
        texts = [piece.text.decode("utf-8") for piece in model.pieces]
    except ValueError as error:
        raise NotServed(f"not read ({error})") from error
    check_settings(model)
    kinds = [piece.type for piece in model.pieces]
    if not set(kinds) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE}:
        raise NotServed("it has unused pieces")
    merged = (NORMAL, USER_DEFINED)
    if any(len(text) < 2 and kind not in merged for text, kind in zip(texts, kinds, strict=True)) or "" in texts:
        raise NotServed("a control piece has a single character")
    if any("\0" in text for text in texts):
        raise NotServed("a piece holds a zero byte")
    scores = [piece.score for piece in model.pieces]
    if any(score != score for score in scores):
        raise NotServed("a score is not a number")
    rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    found = {text: i for i, text in enumerate(texts) if kinds[i] == BYTE}
    # Spaces are escaped before pieces are looked up, so those that hold one are never found.
    return BpeRules(
        texts=[t if kind in merged and " " not in t else "" for t, kind in zip(texts, kinds, strict=True)],
        ranks=[rank_of[score] for score in scores],
        wholes=[i for i, kind in enumerate(kinds) if kind == USER_DEFINED and " " not in texts[i]],
        bytes=byte_ids(found) if model.trainer[BYTE_FALLBACK] else [],
        unknown=kinds.index(UNKNOWN),
        prefix=bool(model.normalizer[DUMMY_PREFIX]),
    )


def check_settings(model: SentencePieceModel) -> None:
    """Raise NotServed unless a SentencePiece model's text is left as it is but for escaped spaces."""
    if model.trainer[MODEL_TYPE] != BPE:
        raise NotServed("not a BPE model")
    if model.trainer[SUFFIX] or not model.normalizer[ESCAPE_SPACES]:
        raise NotServed("its spaces are treated in another way than LLaMA's")
    if model.normalizer[REMOVE_SPACES]:
        raise NotServed("it removes extra spaces")
    if model.normalizer[CHARACTER_MAP]:
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
