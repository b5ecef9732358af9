"""One decoder layer on tensor-parallel linears: attention with query groups, SwiGLU, masks in between.

Legend: S sequence, B batch, D hidden, H query heads, G groups, q = H / G, d head size, F intermediate; lower-case
prefix x_ for activations; under tensor parallelism H, G and F are this rank's share, under sequence parallelism S
outside products too. The fused products keep these row orders: q, k, v by group [G, q + 2, d]; gate then up [2, F].
Read next: `placement.py`.
"""

import torch
from torch import Tensor, nn

from megashear import ops
from megashear.config.shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.parallel import (
    CoreConfig,
    column_parallel,
    gather_features,
    mark_sequence_parallel,
    row_parallel,
)
from megashear.model.masking import LayerMasks


class Norm(nn.Module):
    """RMSNorm over the kept hidden dimensions; the weight [D] is the same on every tensor-parallel rank."""

    def __init__(self, width: int, eps: float, config: CoreConfig, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=config.params_dtype, device=device))
        self.eps = eps
        mark_sequence_parallel(self.weight, config)

    def forward(self, x_SBD: Tensor, mask_D: Tensor | None) -> Tensor:
        """[S, B, D] to [S, B, D]; statistics in fp32 over dimensions whose mask is not 0."""
        return ops.rms_norm(x_SBD, self.weight, self.eps, mask_D)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; the head mask multiplies each query head's output."""

    def __init__(self, shape: ModelShape, config: CoreConfig, layout: Layout) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.queries = shape.queries_per_group
        self.heads = shape.num_heads // layout.tensor_size
        self.groups = max(1, shape.num_query_groups // layout.tensor_size)
        # More tensor-parallel ranks than groups: ranks hold equal parts of the rows and put a group's rows together
        # below.
        self.ranks_per_group = max(1, layout.tensor_size // shape.num_query_groups)
        self.tensor_rank = layout.tensor_rank
        rows = shape.num_query_groups * (shape.queries_per_group + 2) * shape.head_dim
        self.qkv = column_parallel(shape.hidden_size, rows, config)
        self.out = row_parallel(shape.num_heads * shape.head_dim, shape.hidden_size, config)

    def forward(self, x_SBD: Tensor, rope: tuple[Tensor, Tensor], mask_H: Tensor | None) -> Tensor:
        """[S, B, D] to [S, B, D], summed over tensor-parallel ranks; rope: cosines and sines [S, d / 2 or d] in fp32.
        """
        q_BHSd, k_BGSd, v_BGSd = self.split(self.qkv(x_SBD)[0])
        cos, sin = rope
        q_BHSd, k_BGSd = ops.apply_rope(q_BHSd, cos, sin), ops.apply_rope(k_BGSd, cos, sin)
        out_BHSd = ops.attention(q_BHSd, k_BGSd, v_BGSd, mask_H)
        return self.out(out_BHSd.permute(2, 0, 1, 3).flatten(2))[0]

    def split(self, qkv_SBR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fused product's rows as queries [B, H, S, d], keys and values [B, G, S, d]."""
        if self.ranks_per_group > 1:
            return self._split_group(qkv_SBR)
        x_SBGrd = qkv_SBR.unflatten(2, (self.groups, self.queries + 2, self.head_dim))
        q_SBGqd, k_SBGd, v_SBGd = x_SBGrd[..., :-2, :], x_SBGrd[..., -2, :], x_SBGrd[..., -1, :]
        return q_SBGqd.flatten(2, 3).permute(1, 2, 0, 3), k_SBGd.permute(1, 2, 0, 3), v_SBGd.permute(1, 2, 0, 3)

    def _split_group(self, qkv_SBR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same where several ranks share a group: gather all rows, take this rank's query heads and its group."""
        x_SBGrd = gather_features(qkv_SBR).unflatten(2, (-1, self.queries + 2, self.head_dim))
        group = self.tensor_rank // self.ranks_per_group
        first = (self.tensor_rank % self.ranks_per_group) * self.heads
        q_SBqd = x_SBGrd[:, :, group, first : first + self.heads]
        k_SBGd, v_SBGd = x_SBGrd[:, :, group : group + 1, -2], x_SBGrd[:, :, group : group + 1, -1]
        return q_SBqd.permute(1, 2, 0, 3), k_SBGd.permute(1, 2, 0, 3), v_SBGd.permute(1, 2, 0, 3)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x) * mask)."""

    def __init__(self, shape: ModelShape, config: CoreConfig) -> None:
        super().__init__()
        self.gate_up = column_parallel(shape.hidden_size, 2 * shape.intermediate_size, config)
        self.down = row_parallel(shape.intermediate_size, shape.hidden_size, config)

    def forward(self, x_SBD: Tensor, mask_F: Tensor | None) -> Tensor:
        """[S, B, D] to [S, B, D], summed over tensor-parallel ranks."""
        return self.down(ops.swiglu(self.gate_up(x_SBD)[0], mask_F))[0]


class Layer(nn.Module):
    """x += branch * attention(norm(x)); x += branch * mlp(norm(x)), where branch = layer mask * hidden mask."""

    def __init__(self, shape: ModelShape, config: CoreConfig, layout: Layout) -> None:
        super().__init__()
        self.attention_norm = Norm(shape.hidden_size, shape.norm_eps, config, layout.device)
        self.attention = Attention(shape, config, layout)
        self.mlp_norm = Norm(shape.hidden_size, shape.norm_eps, config, layout.device)
        self.mlp = Mlp(shape, config)

    def forward(self, x_SBD: Tensor, rope: tuple[Tensor, Tensor], masks: LayerMasks) -> Tensor:
        """[S, B, D] to [S, B, D]."""
        x_SBD = x_SBD + _masked(
            self.attention(self.attention_norm(x_SBD, masks.hidden), rope, masks.head), masks.branch
        )
        return x_SBD + _masked(self.mlp(self.mlp_norm(x_SBD, masks.hidden), masks.intermediate), masks.branch)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
