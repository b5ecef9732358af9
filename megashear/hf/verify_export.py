"""Verify an export: transformers loads the folder, and computes the logits of an independent forward pass.

`from_pretrained` fills missing tensors with random numbers, so its loading report is read and must be empty. The
reference forward pass is plain torch in fp32, tensor by tensor. Needs memory for the whole model in fp32.
Shape suffixes: B batch, S positions, D hidden, H query heads, G key/value groups, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.errors import ModelError
from megashear.hf import tensor_names
from megashear.hf.model_folder import ModelFolder
from megashear.ops.reference import apply_rope, attention, rms_norm, rope_tables, swiglu


def reference_logits(model: ModelFolder, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits [B, S, V] in fp32 of token ids [B, S], by an independent forward pass.

    Every weight is first rounded to `dtype`, as an export does; None: no rounding. Holds one tensor and the logits.
    """
    shape = model.shape

    def weight(name: str) -> Tensor:
        stored = model.read(name)
        return (stored if dtype is None else stored.to(dtype)).float()

    with torch.no_grad():
        ids = ids_BS.reshape(-1)
        rows = torch.stack([model.read_slice(tensor_names.EMBEDDING, 0, i, i + 1)[0] for i in ids.tolist()])
        rows = rows if dtype is None else rows.to(dtype)
        x_BSD = rows.float().reshape(*ids_BS.shape, shape.hidden_size)
        tables = rope_tables(shape.head_dim, ids_BS.shape[1], shape.rope_theta, shape.rope_scaling)
        for layer in range(shape.num_layers):
            parts = {part: tensor_names.name(layer, part) for part in tensor_names.PARTS}
            normed_BSD = rms_norm(x_BSD, weight(parts["input_norm"]), shape.norm_eps)
            q, k, v = (_heads(normed_BSD @ weight(parts[part]).T, shape.head_dim) for part in "qkv")
            out = attention(apply_rope(q, *tables), apply_rope(k, *tables), v)
            x_BSD = x_BSD + out.transpose(1, 2).flatten(2) @ weight(parts["o"]).T
            normed_BSD = rms_norm(x_BSD, weight(parts["post_attention_norm"]), shape.norm_eps)
            gate_up = torch.cat([normed_BSD @ weight(parts[part]).T for part in ("gate", "up")], dim=-1)
            x_BSD = x_BSD + swiglu(gate_up) @ weight(parts["down"]).T
        x_BSD = rms_norm(x_BSD, weight(tensor_names.FINAL_NORM), shape.norm_eps)
        return x_BSD @ weight(tensor_names.EMBEDDING if shape.tie_word_embeddings else tensor_names.OUTPUT).T


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads


TOLERANCE = 1e-4
"""Largest difference of two fp32 logits as a share of the largest logit: both sides round at 6e-8 in every product."""


def verify_export(folder: Path, model: ModelFolder, dtype: torch.dtype | None = None) -> float:
    """Load `folder` with transformers and compare its logits with those of the independent forward pass of `model`.

    Args:
        folder: Exported folder.
        model: Exported model.
        dtype: Dtype to which weights were rounded.

    Returns:
        Largest difference as a share of the largest logit.

    Raises:
        ModelError: transformers finds a missing, unexpected or mis-shaped tensor, the tokenizer does not load, or
            logits differ by more than TOLERANCE.
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
    """Fixed token ids of the comparison: int64 [2, up to 64], spread over the vocabulary."""
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
