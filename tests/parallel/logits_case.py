"""Logits and greedy decoding of a model folder under a layout; called on the ranks of `launch.Ranks`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.models import build_model
from megashear.config.schema import ParallelConfig
from megashear.engine.collectives import broadcast_object
from megashear.engine.layout import Layout
from megashear.engine.parallel import gather_logits
from megashear.engine.pipeline import run_micro_batches
from megashear.hf.model_folder import ModelFolder
from megashear.model.llama import Llama

LENGTH_STEP = 12  # divisible by tensor-parallel sizes up to 4, as sequence parallelism needs


def greedy(folder: str, parallel: dict[str, Any], prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Logits [prompt, V] of the prompt in fp32, and the tokens that follow it, each the most likely one."""
    source = ModelFolder.open(Path(folder))
    layout, chunks = build_model(source.shape, ParallelConfig(**parallel), source)
    tokens, first = list(prompt), None
    for _ in range(new_tokens):
        logits_SV = forward(layout, chunks, tokens)
        first = logits_SV if first is None else first
        tokens.append(int(logits_SV[-1].argmax()))
    return {"logits": first, "tokens": tokens[len(prompt) :]}


@torch.no_grad()
def forward(layout: Layout, chunks: list[Llama], tokens: list[int]) -> Tensor:
    """Logits [S, V] of one sequence on every rank; it is padded on the right, which causal attention does not see."""
    length = -(-len(tokens) // LENGTH_STEP) * LENGTH_STEP
    tokens_BS = torch.tensor([tokens + [0] * (length - len(tokens))])

    def step(batch_BS: Tensor, chunk: torch.nn.Module) -> Any:
        return chunk(batch_BS), lambda logits_SBV: (logits_SBV.new_zeros(()), gather_logits(logits_SBV))

    # An interleaved schedule wants a multiple of the stages; the copies are not used.
    copies = layout.pipeline_size if layout.virtual_size > 1 else 1
    collected = run_micro_batches(step, list(chunks), [tokens_BS] * copies, length, 1, forward_only=True)
    logits = collected[0][: len(tokens), 0, : chunks[0].shape.vocab_size] if collected else None
    return broadcast_object(logits, source=layout.world_size - 1)  # the last rank is of the last stage
