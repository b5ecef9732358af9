"""The models of the distributed tests: shapes that stress layouts, weights of ordinary size, chunks for a layout.

Sizes divide by 2, 3 and 4 where they must; layers do not divide by the stages, nor the vocabulary by the ranks.
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.engine.layout import Layout, build_layout
from megashear.engine.parallel import transformer_config
from megashear.engine.pipeline import build_chunks
from megashear.hf.tensor_names import tensor_shapes
from megashear.model.llama import Llama
from megashear.model.weight_io import TensorSource, load_weights

MULTI_HEAD = ModelShape(48, 3, 12, 12, 6, 72, 101)
GROUPED = ModelShape(48, 3, 12, 2, 6, 72, 101, tie_word_embeddings=True)
SHAPES = {
    "multi-head": MULTI_HEAD,
    "multi-head tied": replace(MULTI_HEAD, tie_word_embeddings=True),
    "grouped": GROUPED,
    "grouped untied": replace(GROUPED, tie_word_embeddings=False),
    "grouped by 2": replace(GROUPED, num_query_groups=6),
}
TARGETS = {
    name: replace(shape, hidden_size=24, num_layers=2, num_heads=groups, num_query_groups=groups, intermediate_size=36)
    for name, shape in SHAPES.items()
    for groups in [shape.num_query_groups // 2]
}


class Drawn:
    """Weights of unit gain by name alone, norms around 1: logits and gradients are of ordinary size."""

    def __init__(self, shape: ModelShape) -> None:
        self.shapes = tensor_shapes(shape)

    def read(self, name: str) -> Tensor:
        """The whole tensor in fp32."""
        size = self.shapes[name]
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(key))
        return 1 + 0.1 * drawn if len(size) == 1 else drawn / size[-1] ** 0.5

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self.read(name).narrow(dim, start, stop - start)


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    source: TensorSource,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> tuple[Layout, list[Llama]]:
    """This rank's chunks under a layout, filled from `source`; makes the groups anew."""
    layout = build_layout(parallel)
    config = transformer_config(shape, parallel, dtype)

    def build(layers: range, first: bool, last: bool, stage: int | None) -> Llama:
        return Llama(shape, config, layout, layers, first, last, recompute=recompute, vp_stage=stage)

    chunks = build_chunks(shape.num_layers, layout, build)
    for chunk in chunks:
        load_weights(chunk, source)
    return layout, chunks
