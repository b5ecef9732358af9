"""Decoder layer on tensor-parallel linears: attention with query groups, SwiGLU, masks.

Shape suffixes: S sequence, B batch, D hidden, H query heads, G groups, q = H / G, d head size, F intermediate; prefix
x_ for activations. Under tensor parallelism H, G and F are this rank's share, under sequence parallelism S too, outside
of products. Fused products have these row orders: q, k, v by group [G, q + 2, d]; gate then up [2, F]. If masks have
zeros, D, H, G and F count computed units only (`live_units.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.parallel import CoreConfig, column_parallel, gather_features, mark_sequence_parallel, row_parallel
from megashear.model.live_units import LiveLayer, live_product
from megashear.model.masking import LayerMasks


@dataclass(frozen=True)
class Stream:
    """Residual stream between two layers: x + branch * mask, which the next norm adds as it reads.

    x, branch: [S, B, D]; mask: [D], None for ones. Without a branch it is x.
    """

    x_SBD: Tensor
    branch_SBD: Tensor | None = None
    mask_D: Tensor | None = None

    def total(self) -> Tensor:
        """The sum [S, B, D], rounded once to x's dtype."""
        if self.branch_SBD is None:
            return self.x_SBD
        added = self.branch_SBD if self.mask_D is None else self.branch_SBD * self.mask_D
        return (self.x_SBD + added).to(self.x_SBD.dtype)


class Norm(nn.Module):
    """RMSNorm over the kept hidden dimensions; the weight [D] is the same on every tensor-parallel rank."""

    def __init__(self, width: int, eps: float, config: CoreConfig, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=config.params_dtype, device=device))
        self.eps = eps
        mark_sequence_parallel(self.weight, config)

    def forward(self, stream: Stream, mask_D: Tensor | None, live_D: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream [S, B, D] added up, and its norm; statistics in fp32 over dimensions whose mask is not 0.

        live_D: which of the norm's dimensions the stream and the mask have; None for all.
        """
        weight_D = self.weight if live_D is None else self.weight.index_select(0, live_D)
        if stream.branch_SBD is None:
            return stream.x_SBD, ops.rms_norm(stream.x_SBD, weight_D, self.eps, mask_D)
        return ops.add_rms_norm(stream.x_SBD, stream.branch_SBD, stream.mask_D, weight_D, self.eps, mask_D)


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
        self.heads_seen = nn.Identity()  # a place for hooks: [B, H, S, d], what the heads give

    def forward(self, x_SBD: Tensor, rope: tuple[Tensor, Tensor], masks: LayerMasks, first_BS: Tensor | None) -> Tensor:
        """[S, B, D] to [S, B, D], summed over tensor-parallel ranks; rope: cosines and sines [S, d / 2] in fp32.

        first_BS: the first position that each token attends to. Rotary scores know distances alone, so positions that
        start again with each document would change nothing.
        """
        live = masks.live
        qkv_SBR = live_product(self.qkv, x_SBD, live.qkv_rows, masks.live_hidden)
        groups, queries = live.groups, live.queries
        if self.ranks_per_group > 1:
            qkv_SBR, groups, queries = self._own_rows(qkv_SBR, live), 1, live.groups * live.queries
        q_BHSd, k_BGSd, v_BGSd = ops.rope_qkv(qkv_SBR, groups, queries, self.head_dim, *rope)
        out_BHSd = self.heads_seen(ops.attention(q_BHSd, k_BGSd, v_BGSd, masks.head, first_BS))
        return live_product(self.out, out_BHSd.permute(2, 0, 1, 3).flatten(2), masks.live_hidden, live.out_columns)

    def _own_rows(self, qkv_SBR: Tensor, live: LiveLayer) -> Tensor:
        """Rows of this rank's query heads and its group's k and v, if several ranks share a group."""
        x_SBGrd: Tensor = gather_features(qkv_SBR).unflatten(2, (-1, self.queries + 2, self.head_dim))
        group = self.tensor_rank // self.ranks_per_group
        first = (self.tensor_rank % self.ranks_per_group) * self.heads
        heads_H = torch.arange(self.heads, device=qkv_SBR.device) if live.heads is None else live.heads
        key_value = torch.arange(self.queries, self.queries + 2, device=qkv_SBR.device)
        return x_SBGrd[:, :, group].index_select(2, torch.cat([first + heads_H, key_value])).flatten(2)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x) * mask)."""

    def __init__(self, shape: ModelShape, config: CoreConfig) -> None:
        super().__init__()
        self.gate_up = column_parallel(shape.hidden_size, 2 * shape.intermediate_size, config)
        self.down = row_parallel(shape.intermediate_size, shape.hidden_size, config)
        self.units_seen = nn.Identity()  # a place for hooks: [S, B, F], what the intermediate units give

    def forward(self, x_SBD: Tensor, masks: LayerMasks) -> Tensor:
        """[S, B, D] to [S, B, D], summed over tensor-parallel ranks."""
        gate_up = live_product(self.gate_up, x_SBD, masks.live.gate_up_rows, masks.live_hidden)
        out_SBF = self.units_seen(ops.swiglu(gate_up, masks.intermediate))
        return live_product(self.down, out_SBF, masks.live_hidden, masks.live.intermediate)


class Layer(nn.Module):
    """x += branch * attention(norm(x)); x += branch * mlp(norm(x)), where branch = layer mask * hidden mask."""

    def __init__(self, shape: ModelShape, config: CoreConfig, layout: Layout) -> None:
        super().__init__()
        self.attention_norm = Norm(shape.hidden_size, shape.norm_eps, config, layout.device)
        self.attention = Attention(shape, config, layout)
        self.mlp_norm = Norm(shape.hidden_size, shape.norm_eps, config, layout.device)
        self.mlp = Mlp(shape, config)

    def forward(
        self, stream: Stream, rope: tuple[Tensor, Tensor], masks: LayerMasks, first_BS: Tensor | None = None
    ) -> Stream:
        """The stream after this layer; the MLP's part is not added yet."""
        return self.transform(self.attend(stream, rope, masks, first_BS), masks)

    def attend(
        self, stream: Stream, rope: tuple[Tensor, Tensor], masks: LayerMasks, first_BS: Tensor | None = None
    ) -> Stream:
        """The stream after attention, whose branch is not added yet."""
        if not masks.live.attention:
            return stream
        x_SBD, normed_SBD = self.attention_norm(stream, masks.norm, masks.live_hidden)
        return Stream(x_SBD, self.attention(normed_SBD, rope, masks, first_BS), masks.branch)

    def transform(self, stream: Stream, masks: LayerMasks) -> Stream:
        """The stream after the MLP, whose branch is not added yet."""
        if not masks.live.mlp:
            return stream
        x_SBD, normed_SBD = self.mlp_norm(stream, masks.norm, masks.live_hidden)
        return Stream(x_SBD, self.mlp(normed_SBD, masks), masks.branch)
