"""Tokenizers from SentencePiece's `tokenizer.model` and Hugging Face's `tokenizer.json`.

Ids are those of the library, without begin or end tokens, with the compiled encoder too. The digest identifies the
tokenizer in every dataset and checkpoint. Nothing is downloaded, and nothing read from a file executes code.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from megashear.dataset import bpe
from megashear.errors import DataError
from megashear.files.file_digests import digest

# Where the end-of-sequence token is looked up beside a tokenizer.json, in this order.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
# What travels with a tokenizer into datasets and exports; a model's config.json is its own.
COMPANIONS = (*SETTINGS[:3], "added_tokens.json", "tokenizer.model")
# Encoded by both encoders before the compiled one serves: a library that has come to differ is noticed.
PROBE = "Hello,  world\n\n\tnaïve\u2581 ▁▁   x=1;日本語 Привет 🐍\0\x7f\u200b 0123456789 "
PROBE += "".join(map(chr, range(1, 700)))


class Encoder(Protocol):
    """What a tokenizer library must give: text to ids and back, number of ids, end-of-sequence id."""

    vocab_size: int
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""

    def rules(self) -> bpe.BpeRules:
        """The same ids as rules for the compiled encoder; raises NotServed."""


class SentencePieceEncoder:
    """`tokenizer.model` through the sentencepiece library."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the library refuses the file."""
        import sentencepiece

        self._path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a SentencePiece model ({error}); give the model's tokenizer.model") from error
        self.vocab_size = self._model.vocab_size()
        eos = self._model.eos_id()
        self.eos_id = eos if eos >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        text: str = self._model.decode(ids)
        return text

    def rules(self) -> bpe.BpeRules:
        """The rules of its file; raises NotServed."""
        return bpe.sentencepiece_rules(self._path.read_bytes())


class HuggingFaceEncoder:
    """`tokenizer.json` through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the library refuses the file."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer.json ({error}); give the model's tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = self._find_eos(path.parent)

    def _find_eos(self, folder: Path) -> int | None:
        """The end-of-sequence id that the files beside the tokenizer name, first file first."""
        for name in SETTINGS:
            settings = read_settings(folder / name)
            token = settings.get("eos_token")
            content = token.get("content") if isinstance(token, dict) else token
            ids = settings.get("eos_token_id")
            found = self._tokenizer.token_to_id(content) if isinstance(content, str) else ids
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int):
                return found
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def rules(self) -> bpe.BpeRules:
        """The rules of its file as the library has read it; raises NotServed."""
        return bpe.tokenizer_json_rules(orjson.loads(self._tokenizer.to_str()))


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object beside a tokenizer, {} where there is none; raises DataError where it is not one."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON ({error}); repair or remove it") from error
    return settings if isinstance(settings, dict) else {}


class Tokenizer:
    """A loaded tokenizer.

    Attributes: `path` of its main file; `name` of that file; `digest`, the file's SHA-256; `vocab_size`, one more than
    the largest id; `eos_id`; `files`, the paths to carry along into a dataset or an export; `served_by`.
    """

    def __init__(self, path: Path, encoder: Encoder, eos_id: int) -> None:
        self.path, self.name = path, path.name
        self.digest = digest(path)
        self.vocab_size, self.eos_id = encoder.vocab_size, eos_id
        self.files = [path] + [p for name in COMPANIONS if (p := path.parent / name).is_file() and p != path]
        self._encoder = encoder

    @cached_property
    def _compiled(self) -> tuple[bpe.CompiledEncoder | None, list[str], str]:
        """The compiled encoder, strings it does not take, and the reason where there is none; made when first asked."""
        try:
            rules = self._encoder.rules()
            compiled = bpe.compile_rules(rules)
        except bpe.NotServed as reason:
            return None, [], str(reason)
        if compiled.encode(PROBE).tolist() != self._encoder.encode(PROBE):
            return None, [], "it gives other ids than the library"
        return compiled, rules.apart, ""

    @property
    def served_by(self) -> str:
        """What encodes: `compiled encoder`, or `library` and why."""
        compiled, _, reason = self._compiled
        return "compiled encoder" if compiled is not None else f"library ({reason})"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens], as the library's own encoder gives them; no token is added.

        text: must hold no lone surrogate (text read from UTF-8 or JSON has none).
        """
        compiled, apart, _ = self._compiled
        if compiled is not None and not any(token in text for token in apart):
            return compiled.encode(text)
        return np.array(self._encoder.encode(text), dtype=np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of ids [tokens]."""
        return self._encoder.decode([int(i) for i in ids])


def tokenizer_file(path: Path) -> Path:
    """The main file: `path`, or in a folder `tokenizer.json`, else `tokenizer.model`. Raises DataError."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise DataError(f"{path}: holds neither tokenizer.json nor tokenizer.model; give the folder of a tokenizer")
    if not path.is_file():
        raise DataError(f"{path}: not found; give a tokenizer.model, a tokenizer.json or a folder holding one")
    return path


def load_tokenizer(path: Path | str, eos_id: int | None = None) -> Tokenizer:
    """Load a `tokenizer.model`, a `tokenizer.json`, or the one in a folder (`tokenizer.json` where it holds both).

    eos_id: the end-of-sequence id where it is known from elsewhere; null: the SentencePiece model's own, or what
    tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json beside a tokenizer.json name.
    Raises DataError: no such file, a damaged one, or one whose end-of-sequence token is not known.
    """
    file = tokenizer_file(Path(path)).absolute()
    encoder: Encoder = HuggingFaceEncoder(file) if file.suffix == ".json" else SentencePieceEncoder(file)
    eos = encoder.eos_id if eos_id is None else eos_id
    if eos is None:
        raise DataError(
            f"{file}: no end-of-sequence token known; put a tokenizer_config.json with `eos_token` beside it, "
            "documents must end in one"
        )
    if not 0 <= eos < encoder.vocab_size:
        raise DataError(
            f"{file}: the end-of-sequence id {eos} is outside of its {encoder.vocab_size} ids; repair the files"
        )
    return Tokenizer(file, encoder, eos)
