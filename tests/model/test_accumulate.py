"""Gradients in bf16 reach megatron-core's fp32 buffers with the bits that its own hook gives, and are then let go."""

import pytest
import torch

from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import OptimizerConfig
from megashear.engine.layout import distributed
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.engine.pipeline import build_chunks, run_micro_batches
from megashear.model import llama
from megashear.model.weight_io import RandomWeights, load_weights

SHAPE = ModelShape(32, 2, 4, 2, 8, 48, 61, tie_word_embeddings=True)


def _buffers(layout, sharded: bool) -> dict[str, torch.Tensor]:
    """The fp32 gradients of two micro-batches."""
    core = transformer_config(SHAPE, ParallelConfig(), torch.bfloat16)

    def build(layers: range, pre: bool, post: bool, stage: int | None) -> llama.Llama:
        return llama.Llama(SHAPE, core, layout, layers, pre, post, vp_stage=stage)

    chunks = build_chunks(SHAPE.num_layers, layout, build)
    load_weights(chunks[0], RandomWeights(SHAPE, 3))
    weights = WeightOptimizer(chunks, OptimizerConfig(), torch.bfloat16, sharded)
    weights.zero_gradients()
    tokens = torch.randint(0, 61, (2, 1, 17), generator=torch.Generator().manual_seed(5))

    def forward(batch, chunk):
        return chunk(batch[:, :-1], batch[:, 1:]), lambda losses: (losses.mean(), None)

    run_micro_batches(forward, weights.chunks, list(tokens), 16, 1)
    module = weights.chunks[0].module
    assert all(parameter.grad is None for parameter in module.parameters())
    return {name: parameter.main_grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("sharded", [True, False])
def test_buffers_hold_the_bits_of_megatron_core(sharded, monkeypatch):
    with distributed(ParallelConfig()) as layout:
        ours = _buffers(layout, sharded)
        monkeypatch.setattr(llama, "accumulate_in_one_pass", lambda module: None)
        theirs = _buffers(layout, sharded)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.dtype == torch.float32 and gradient.any() and torch.equal(ours[name], gradient), name
