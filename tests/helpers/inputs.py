"""Small real inputs: texts, tokenizers, LLaMAs that transformers makes and saves, and dataset folders."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from megashear.dataset.dataset_folder import SPLITS, prefix, write_dataset_manifest
from megashear.dataset.indexed import IndexedWriter, token_dtype
from megashear.dataset.tokenizer import load_tokenizer
from megashear.files.atomic import atomic_folder

LINES = {
    "library": ("def {0}(self, {1}):", "    {0} = {1}({2})", "    if {0} is not {1}:", "        return {0}.{1}"),
    "command": ("{0}.add_{1}('--{2}', {3}={4})", "# {0} the {1} of {2}", "    {0}, {1} = {2}.{3}()", "import {0}"),
    "help": ("The {0} {1} a {2} of the {3}.", "When {0}, see {1} and {2}.", "* {0}: {1} {2} {3} {4}", "Usage: {0} {1}"),
}
"""Forms of a line of each domain."""


def make_text(domain: str, characters: int = 90_000) -> str:
    """Return a text that is the same with every version of Python: lines of words that are frequent or rare.

    Paragraphs of one to eight lines, so that a small model learns the forms soon and the words slowly.
    """
    random = Random(domain).random  # of all methods, the one whose numbers are guaranteed not to change
    syllables = [a + b for a in "bcdfglmnprst" for b in "aeiou"]

    def pick(items: Sequence[str], skew: float) -> str:
        return items[int(len(items) * random() ** skew)]

    words = ["".join(pick(syllables, 1.0) for _ in range(1 + int(3 * random()))) for _ in range(400)]
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < characters:
        lines = range(1 + int(8 * random()))
        paragraphs.append(
            "\n".join(pick(LINES[domain], 1.0).format(*(pick(words, 3.0) for _ in range(5))) for _ in lines)
        )
    return "\n\n".join(paragraphs)


TEXTS = {domain: make_text(domain) for domain in LINES}


def make_tokenizer(path: Path, size: int, texts: Iterable[str] = TEXTS.values()) -> None:
    """Write a byte-level BPE tokenizer.json of `size` ids and its tokenizer_config.json; the end token is `<end>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    config = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))


def make_llama(
    folder: Path,
    seed: int = 1,
    norms: bool = False,
    dtype: Any = None,
    max_shard_size: str = "5GB",
    **config: Any,
) -> None:
    """Save a random LLaMA, by transformers; weights of deviation 0.2, so that attention is far from uniform.

    Args:
        folder: Where to write config.json and model.safetensors.
        seed: Of torch's generator.
        norms: Whether norm weights are drawn from 0.5 to 1.5, not 1.
        dtype: Of the weights; None means fp32.
        max_shard_size: Largest file, as `save_pretrained` takes it.
        config: Keys of `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    network = LlamaForCausalLM(LlamaConfig(**{"initializer_range": 0.2, **config}))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if norms and name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
    network.to(dtype or torch.float32).save_pretrained(folder, max_shard_size=max_shard_size)


def make_dataset(folder: Path, tokenizer_path: Path, texts: dict[str, str], heldout: int = 2000) -> None:
    """Write a dataset folder; documents are paragraphs, the first `heldout` characters of a text are held out."""
    tokenizer = load_tokenizer(tokenizer_path)

    def documents(text: str) -> Iterator[np.ndarray]:
        for paragraph in text.split("\n\n") if text else []:
            yield np.array([*tokenizer.encode(paragraph), tokenizer.eos_id])

    parts = {name: (documents(text[heldout:]), documents(text[:heldout])) for name, text in texts.items()}
    write_dataset(folder, tokenizer_path, parts)


def make_random_dataset(folder: Path, tokenizer_path: Path, tokens: dict[str, tuple[int, int]], seed: int = 0) -> Path:
    """Write a dataset folder of random ids: {domain: (train tokens, held-out tokens)}, documents of up to 50 tokens."""
    random = np.random.default_rng(seed)
    tokenizer = load_tokenizer(tokenizer_path)

    def documents(total: int) -> Iterator[np.ndarray]:
        while total:
            length = min(int(random.integers(1, 50)), total)
            ids = random.integers(0, tokenizer.vocab_size, length)
            ids[-1] = tokenizer.eos_id
            total -= length
            yield ids

    write_dataset(folder, tokenizer_path, {name: tuple(map(documents, wanted)) for name, wanted in tokens.items()})
    return folder


def write_dataset(folder: Path, tokenizer_path: Path, parts: dict[str, Iterable[Iterable[np.ndarray]]]) -> None:
    """Write a dataset folder of documents by domain: {domain: (train, held-out)}."""
    tokenizer = load_tokenizer(tokenizer_path)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    with atomic_folder(folder) as temporary:
        for domain, splits in parts.items():
            for split, documents in zip(SPLITS, splits, strict=True):
                with IndexedWriter(prefix(temporary, domain, split), token_dtype(tokenizer.vocab_size)) as writer:
                    for ids in documents:
                        writer.add_document(ids)
                counted = {"tokens": writer.tokens, "documents": writer.documents}
                counts.setdefault(domain, {})[split] = counted
        (temporary / "tokenizer").mkdir()
        for file in tokenizer.files:
            (temporary / "tokenizer" / file.name).write_bytes(file.read_bytes())
        write_dataset_manifest(temporary, counts, tokenizer, {})
