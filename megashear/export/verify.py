"""The proof of an export: transformers loads the folder without a missing tensor and computes our logits.

`from_pretrained` fills a tensor that it does not find with random numbers and says so in a log at most; here its
loading report is read and anything but an empty one refused. Needs memory for the whole model in fp32, unlike the
writing. Read next: `reference_forward.py`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.config.shape import ModelShape
from megashear.errors import ModelError
from megashear.export.reference_forward import reference_logits
from megashear.weights.folder import ModelFolder

TOLERANCE = 1e-4
"""Largest difference of two fp32 logits as a share of the largest logit: both sides round at 6e-8 in every product."""


def verify_export(folder: Path, model: ModelFolder, dtype: torch.dtype | None = None) -> float:
    """Load `folder` with transformers and compare its logits with those of `model` by our own definition.

    model: what was exported, `dtype` what its weights were rounded to. Returns the largest difference as a share of the
    largest logit. Raises ModelError: a tensor missing, unexpected or mis-shaped to transformers, a tokenizer that does
    not load, logits that differ by more than TOLERANCE.
    """
    _check_tokenizer(folder, model)
    ids_BS = check_tokens(model.shape)
    loaded_BSV = _transformers_logits(folder, ids_BS)
    ours_BSV = reference_logits(model, ids_BS, dtype)
    difference = ((loaded_BSV - ours_BSV).abs().max() / ours_BSV.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{folder}: logits by transformers differ from ours by {difference:.1e} of the largest (allowed"
            f" {TOLERANCE:.0e}); the export is not kept, please report this with config.json"
        )
    return difference


def check_tokens(shape: ModelShape) -> Tensor:
    """The fixed token ids of the comparison: int64 [2, up to 64], spread over the vocabulary."""
    positions = min(64, shape.max_position_embeddings)
    return (torch.arange(2 * positions) * 7919 % shape.vocab_size).reshape(2, positions)


def _transformers_logits(folder: Path, ids_BS: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever transformers objects to is a folder that must not leave
        raise ModelError(f"{folder}: transformers does not load this export ({error}); it is not kept") from error
    network, report = loaded
    problems = [f"{kind}: {name}" for kind, found in report.items() for name in found]
    if problems:
        raise ModelError(f"{folder}: not kept, for transformers reports:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        logits: Tensor = network.eval()(ids_BS).logits.float()
        return logits


def _check_tokenizer(folder: Path, model: ModelFolder) -> None:
    if not model.tokenizer_files:
        return
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)("Once upon a time, in 2024").input_ids
    except Exception as error:
        raise ModelError(f"{model.path}: transformers does not load its tokenizer ({error})") from error
    if max(ids, default=0) >= model.shape.vocab_size:
        raise ModelError(
            f"{model.path}: its tokenizer gives id {max(ids)}, the vocabulary has {model.shape.vocab_size} rows;"
            " put the tokenizer of this model beside its weights"
        )
