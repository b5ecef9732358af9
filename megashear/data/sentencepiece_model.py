"""What a SentencePiece `tokenizer.model` says: its pieces and the settings that decide about ids.

The library gives pieces and scores, but not how text is normalised, so the few fields are read from the file itself:
protocol buffers' wire format, fields numbered as in SentencePiece's `sentencepiece_model.proto`. Read next: `bpe.py`.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

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
