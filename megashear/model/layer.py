"""One decoder layer on tensor-parallel linears: attention with query groups, SwiGLU, masks in between.

Legend: S sequence, B batch, D hidden, H query heads, G groups, q = H / G, d head size, F intermediate; lower-case
prefix x_ for activations; under tensor parallelism H, G and F are this rank's share, under sequence parallelism S
outside products too. The fused products keep these row orders: q, k, v by group [G, q + 2, d]; gate then up [2, F].
Where masks have zeros, D, H, G and F are what is live of them (`live.py`). Read next: `live_linear.py`, `placement.py`.
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
from megashear.model.live import LiveLayer
from megashear.model.live_linear import live_product
from megashear.model.masking import LayerMasks


class Norm(nn.Module):
    """RMSNorm over the kept hidden dimensions; the weight [D] is the same on every tensor-parallel rank."""

    def __init__(self, width: int, eps: float, config: CoreConfig, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=config.params_dtype, device=device))
        self.eps = eps
        mark_sequence_parallel(self.weight, config)

    def forward(self, x_SBD: Tensor, mask_D: Tensor | None, live_D: Tensor | None) -> Tensor:
        """[S, B, D] to [S, B, D]; statistics in fp32 over dimensions whose mask is not 0.

        live_D: which of the norm's dimensions x and the mask have; None for all.
        """
        weight_D = self.weight if live_D is None else self.weight.index_select(0, live_D)
        return ops.rms_norm(x_SBD, weight_D, self.eps, mask_D)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; the head mask multiplies each query head's output."""

    def __init__(self, shape: ModelShape, config: CoreConfig, layout: Layout) -> None:
        super().__init__()
        self.head_dim, self.queries = shape.head_dim, shape.queries_per_group
        self.heads = shape.num_heads // layout.tensor_size
        # More tensor-parallel ranks than groups: ranks hold equal parts of the rows and put a group's rows together
        # below.
        self.ranks_per_group = max(1, layout.tensor_size // shape.num_query_groups)
        self.tensor_rank = layout.tensor_rank
        rows = shape.num_query_groups * (shape.queries_per_group + 2) * shape.head_dim
        self.qkv = column_parallel(shape.hidden_size, rows, config)
        self.out = row_parallel(shape.num_heads * shape.head_dim, shape.hidden_size, config)

    def forward(self, x_SBD: Tensor, rope: tuple[Tensor, Tensor], masks: LayerMasks) -> Tensor:
        """[S, B, D] to [S, B, D], summed over tensor-parallel ranks; rope: cosines and sines [S, d / 2] in fp32."""
        live = masks.live
        q_BHSd, k_BGSd, v_BGSd = self.split(live_product(self.qkv, x_SBD, live.qkv_rows, masks.live_hidden), live)
        cos, sin = rope
        q_BHSd, k_BGSd = ops.apply_rope(q_BHSd, cos, sin), ops.apply_rope(k_BGSd, cos, sin)
        out_BHSd = ops.attention(q_BHSd, k_BGSd, v_BGSd, masks.head)
        return live_product(self.out, out_BHSd.permute(2, 0, 1, 3).flatten(2), masks.live_hidden, live.out_columns)

    def split(self, qkv_SBR: Tensor, live: LiveLayer) -> tuple[Tensor, Tensor, Tensor]:
        """The fused product's rows as queries [B, H, S, d], keys and values [B, G, S, d]."""
        if self.ranks_per_group > 1:
            return self._split_group(qkv_SBR, live.heads)
        x_SBGrd = qkv_SBR.unflatten(2, (live.groups, live.queries + 2, self.head_dim))
        q_SBGqd, k_SBGd, v_SBGd = x_SBGrd[..., :-2, :], x_SBGrd[..., -2, :], x_SBGrd[..., -1, :]
        return q_SBGqd.flatten(2, 3).permute(1, 2, 0, 3), k_SBGd.permute(1, 2, 0, 3), v_SBGd.permute(1, 2, 0, 3)

    def _split_group(self, qkv_SBR: Tensor, live_H: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same where several ranks share a group: gather all rows, take this rank's query heads and its group."""
        x_SBGrd = gather_features(qkv_SBR).unflatten(2, (-1, self.queries + 2, self.head_dim))
        group = self.tensor_rank // self.ranks_per_group
        first = (self.tensor_rank % self.ranks_per_group) * self.heads
        q_SBqd = x_SBGrd[:, :, group, first : first + self.heads]
        if live_H is not None:
            q_SBqd = q_SBqd.index_select(2, live_H)
        k_SBGd, v_SBGd = x_SBGrd[:, :, group : group + 1, -2], x_SBGrd[:, :, group : group + 1, -1]
        return q_SBqd.permute(1, 2, 0, 3), k_SBGd.permute(1, 2, 0, 3), v_SBGd.permute(1, 2, 0, 3)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x) * mask)."""

    def __init__(self, shape: ModelShape, config: CoreConfig) -> None:
        super().__init__()
        self.gate_up = column_parallel(shape.hidden_size, 2 * shape.intermediate_size, config)
        self.down = row_parallel(shape.intermediate_size, shape.hidden_size, config)

    def forward(self, x_SBD: Tensor, masks: LayerMasks) -> Tensor:
        """[S, B, D] to [S, B, D], summed over tensor-parallel ranks."""
        gate_up = live_product(self.gate_up, x_SBD, masks.live.gate_up_rows, masks.live_hidden)
        out_SBF = ops.swiglu(gate_up, masks.intermediate)
        return live_product(self.down, out_SBF, masks.live_hidden, masks.live.intermediate)


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
        live, hidden = masks.live, (masks.hidden, masks.live_hidden)
        if live.attention:
            x_SBD = x_SBD + _masked(self.attention(self.attention_norm(x_SBD, *hidden), rope, masks), masks.branch)
        if live.mlp:
            x_SBD = x_SBD + _masked(self.mlp(self.mlp_norm(x_SBD, *hidden), masks), masks.branch)
        return x_SBD


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
