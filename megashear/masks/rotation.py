"""Rotate a LLaMA into another orthonormal basis of its residual stream.

RMSNorm without its weight commutes with rotations, so norm weights are moved into the matrices that read the norm,
which then are rotated by the columns of Q (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024, section 3; one Q for all
layers, so that the result is an ordinary LLaMA):

    embedding Q        q, k, v, gate, up, output: W diag(norm / c) Q        o, down: Q^T W        norms c

c, one number per norm, is the root mean square of its weights, often a few tenths. Moving all of the norm into the
matrices would shrink them, and Adam's steps, whose length does not shrink, would change them too much.

The result is exact except for one rounding to the dtype; products are computed in fp64 on a CPU and in fp32 elsewhere.
A tied output layer cannot absorb the final norm's weight, so a tied model is equal only as far as that weight is
constant over the rotated units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.hf.tensor_names import EMBEDDING, FINAL_NORM, OUTPUT, PARTS
from megashear.hf.tensor_names import name as layer_name
from megashear.masks.fold import LAYER_NAME

READS = {"q": "input_norm", "k": "input_norm", "v": "input_norm", "gate": "post_attention_norm"}
READS["up"] = READS["gate"]
"""Matrices that read a norm's output, and the norm."""
WRITES = ("o", "down")
"""Matrices whose output is added to the residual stream."""
SHORT = {full.removesuffix(".weight"): part for part, full in PARTS.items()}


@dataclass(frozen=True)
class Rotation:
    """Rotates any tensor of a LLaMA; call it tensor by tensor, in any order."""

    basis_DD: Tensor
    """Orthonormal columns, fp64: the new basis in coordinates of the old one."""
    read: Callable[[str], Tensor]
    """Full tensors of the model by Hugging Face's names."""
    final_norm_D: Tensor | None = None
    """Weight of the final norm in the new basis, for a tied model."""

    def __call__(self, name: str) -> Tensor:
        """The rotated tensor, in the basis's precision, on its device."""
        tensor = self.read(name).to(self.basis_DD)
        if name == EMBEDDING:
            return tensor @ self.basis_DD
        if name == FINAL_NORM:
            return uniform(tensor) if self.final_norm_D is None else self.final_norm_D
        if name == OUTPUT:
            return self._reader(tensor, FINAL_NORM)
        match = LAYER_NAME.fullmatch(name)
        assert match is not None, name
        part = SHORT[match[2]]
        if part in READS:
            return self._reader(tensor, layer_name(int(match[1]), READS[part]))
        return self.basis_DD.T @ tensor if part in WRITES else uniform(tensor)

    def _reader(self, tensor: Tensor, norm: str) -> Tensor:
        norm_D = self.read(norm).to(self.basis_DD)
        return (tensor * (norm_D / uniform(norm_D))) @ self.basis_DD


def uniform(norm_D: Tensor) -> Tensor:
    """Norm weights in a rotated basis, [D]: the root mean square of the original weights (1 if that is 0).

    Rounded to bf16, so that it is the same number in every precision.
    """
    size = norm_D.square().mean().sqrt().to(torch.bfloat16).to(norm_D)
    return torch.where(size > 0, size, torch.ones_like(size)).expand_as(norm_D)
