"""Fold a masked model into a plain dense LLaMA, one Hugging Face tensor after another.

Removed units are cut out, and mask values are multiplied into the weights. With deterministic masks the masked forward
pass and the pruned model compute the same function, so only rounding differs: the masked norm divides by the count of
hidden units that are not 0, which is the pruned model's hidden size. Where each mask value goes (z: masks, K: kept
units):

    embedding [:, K] * z_hidden                         norms [K] * z_hidden * gain
    q, k, v [rows, K]                                   o [K, rows] * z_layer * z_hidden (rows) * z_head (columns)
    gate [K, K], up [K, K] * z_intermediate (rows)      down [K, K] * z_layer * z_hidden (rows)
    final norm as others, or [K] * gain if tied         output [:, K]

z_head goes into o's columns, because query heads of a group share v. A tied output layer already holds the embedding's
z_hidden, so the final norm omits it: (w z) E^T = w (E z)^T, and the tie survives. Under `published` masking the
embedding is not masked, and the final norm carries z_hidden in both cases.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.errors import ModelError
from megashear.masks.kept_units import KeptUnits
from megashear.masks.mask_values import Masks

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Folding:
    """Folds any tensor of the source; call it tensor by tensor, in any order."""

    source: ModelShape
    keep: KeptUnits
    masks: Masks
    """Deterministic masks that are open exactly where `keep` keeps."""
    masking: str = "exact"
    """prune.masking of the run that made the masks: exact or published."""

    def __call__(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Fold a tensor.

        Args:
            name, tensor: Full tensor of the source under its Hugging Face name.

        Returns:
            Name and tensor in the pruned model, computed in at least fp32 and rounded once; None if it is removed (a
            dropped layer, or a tied copy of the embedding).

        Raises:
            ModelError: LLaMA has no tensor of this name.
        """
        match = LAYER_NAME.fullmatch(name)
        if match:
            return self._layer(int(match[1]), match[2], name, tensor)
        hidden, z_hidden = self.keep.hidden, self.masks.hidden
        exact = self.masking == "exact"
        if name == "model.embed_tokens.weight":
            return name, cut(tensor, columns=hidden, column_scale=z_hidden if exact else None)
        if name == "model.norm.weight":
            in_output = exact and self.source.tie_word_embeddings
            return name, cut(tensor, rows=hidden, row_scale=self.masks.norm_gain if in_output else self._norm_scale())
        if name == "lm_head.weight":
            return None if self.source.tie_word_embeddings else (name, cut(tensor, columns=hidden))
        raise ModelError(f"{name}: not a tensor of a LLaMA; the model holds something that cannot be pruned here")

    def _layer(self, layer: int, part: str, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Fold a tensor of source layer `layer`, and renumber it."""
        place = (self.keep.layer == layer).nonzero()
        if place.numel() == 0:
            return None
        new_name = f"model.layers.{int(place)}.{part}.weight"
        hidden = self.keep.hidden
        columns_I = self.keep.intermediate[layer]
        if part in NORMS:
            return new_name, cut(tensor, rows=hidden, row_scale=self._norm_scale())
        if part == "self_attn.q_proj":
            return new_name, cut(tensor, rows=self._head_rows(self.keep.head[layer]), columns=hidden)
        if part in ("self_attn.k_proj", "self_attn.v_proj"):
            return new_name, cut(tensor, rows=self._head_rows(self.keep.group[layer]), columns=hidden)
        if part == "self_attn.o_proj":
            z_head = None if self.masks.head is None else self.masks.head[layer]
            z_columns = None if z_head is None else z_head.repeat_interleave(self.source.head_dim)
            return new_name, cut(
                tensor, hidden, self._head_rows(self.keep.head[layer]), self._branch_scale(layer), z_columns
            )
        if part == "mlp.gate_proj":
            return new_name, cut(tensor, rows=columns_I, columns=hidden)
        if part == "mlp.up_proj":
            z_intermediate = None if self.masks.intermediate is None else self.masks.intermediate[layer]
            return new_name, cut(tensor, rows=columns_I, columns=hidden, row_scale=z_intermediate)
        if part == "mlp.down_proj":
            return new_name, cut(tensor, hidden, columns_I, self._branch_scale(layer))
        raise ModelError(f"{name}: not a tensor of a LLaMA; the model holds something that cannot be pruned here")

    def _head_rows(self, heads: Tensor) -> Tensor:
        """Rows of the given heads in a projection, head_dim per head."""
        return (heads[:, None] * self.source.head_dim + torch.arange(self.source.head_dim)).reshape(-1)

    def _norm_scale(self) -> Tensor | None:
        """Factor of a norm's output, [d]: hidden mask times gain."""
        hidden, gain = self.masks.hidden, self.masks.norm_gain
        return hidden if hidden is None or gain is None else hidden * gain

    def _branch_scale(self, layer: int) -> Tensor | None:
        """Factor of a branch's output, [d] or [1]: layer mask times hidden mask."""
        hidden = self.masks.hidden
        if self.masks.layer is None:
            return hidden
        z_layer = self.masks.layer[layer : layer + 1]
        return z_layer if hidden is None else z_layer * hidden


def cut(
    tensor: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """Select rows and columns of a matrix (or entries of a vector), scale them by mask values, and round once.

    Args:
        tensor: Matrix or vector.
        rows, columns: int64 indices; None keeps all.
        row_scale, column_scale: Values for all source rows and columns, or [1] for the same value; None: ones.

    Returns:
        Contiguous tensor of the input's dtype, on its device.
    """
    out = tensor
    for dim, index in ((0, rows), (1, columns)):
        if index is not None:
            out = out.index_select(dim, index.to(tensor.device))
    for dim, index, scale in ((0, rows, row_scale), (1, columns, column_scale)):
        if scale is not None:
            kept = scale if scale.numel() == 1 or index is None else scale[index.to(scale.device)]
            wide = torch.promote_types(torch.promote_types(out.dtype, scale.dtype), torch.float32)
            shape = [-1 if at == dim else 1 for at in range(out.dim())]
            out = out.to(wide) * kept.to(device=tensor.device, dtype=wide).view(shape)
    return out.to(tensor.dtype).contiguous()
