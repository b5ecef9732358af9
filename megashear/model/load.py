"""Filling a rank's parameters from a folder of weights, or at random, piece by piece.

Key properties: a rank reads its own slices only; random weights are a function of (seed, tensor name), so every
layout starts from the same model. Read next: `placement.py`.
"""

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor

from megashear.config.shape import ModelShape
from megashear.model.llama import Llama
from megashear.model.placement import Piece, chunk_pieces
from megashear.weights.names import tensor_shapes


class TensorSource(Protocol):
    """Where weights come from; names and full shapes are Hugging Face's."""

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) start .. stop of a tensor."""
        ...


class RandomWeights:
    """A model from scratch: N(0, 0.02), products into the residual stream divided by sqrt(2 L), norms 1 (GPT-2,
    section 2.3).
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.seed = shape, seed
        self.shapes = tensor_shapes(shape)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """A slice of the tensor that (seed, name) determine, in fp32."""
        full = self.shapes[name]
        if len(full) == 1:
            return torch.ones(stop - start)
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * self.shape.num_layers) if residual else 0.02
        return (torch.randn(full, generator=generator) * deviation).narrow(dim, start, stop - start)


def read_piece(source: TensorSource, piece: Piece) -> Tensor:
    """A piece with its padding rows of zeros."""
    part = source.read_slice(piece.name, piece.dim, piece.start, piece.stop)
    if not piece.padding:
        return part
    return torch.cat([part, part.new_zeros(piece.padding, *part.shape[1:])])


@torch.no_grad()
def load_weights(module: Llama, source: TensorSource) -> None:
    """Fill a chunk's parameters, in their own dtype."""
    pieces = chunk_pieces(module.shape, module.layout, module.layer_range, module.pre_process, module.post_process)
    for name, parameter in module.named_parameters():
        row = 0
        for piece in pieces.pop(name):
            part = read_piece(source, piece)
            parameter[row : row + len(part)].copy_(part)
            row += len(part)
        assert row == len(parameter), f"{name}: {row} of {len(parameter)} rows filled"
    assert not pieces, f"pieces without a parameter: {sorted(pieces)}"
