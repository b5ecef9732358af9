"""Slices of the masks that a rank needs, with gradients that add up over ranks.

Head and intermediate masks act on tensor-parallel shards: a rank takes its slice, and the sum of all gradients is
complete. Hidden and layer masks act on activations that every tensor-parallel rank holds (then each gradient counts 1 /
TP), or that are split by sequence (then the parts add up). One sum over tensor- and pipeline-parallel ranks completes
every mask's gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout
from megashear.masks.mask_values import Masks
from megashear.model.live_units import LiveLayer, LiveStage


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer on one rank, of its live units alone; None is a mask of ones."""

    norm: Tensor | None  # [D]: hidden * norm gain, on what norms give
    head: Tensor | None  # [H / TP]
    intermediate: Tensor | None  # [F / TP]
    branch: Tensor | None  # [D]: hidden * layer, on what a branch adds to the residual stream
    live: LiveLayer
    live_hidden: Tensor | None  # indices of the live hidden dimensions [D]; None for all


@dataclass(frozen=True)
class StageMasks:
    """The masks of a model chunk: one entry a local layer, the hidden mask of the embedding, that of the final norm."""

    hidden: Tensor | None
    norm: Tensor | None
    live_hidden: Tensor | None
    layers: list[LayerMasks]


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    apply: ClassVar[Callable[..., Tensor]]  # untyped in torch

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def shared_by_ranks(mask: Tensor | None, layout: Layout) -> Tensor | None:
    """A mask on activations: its gradient is scaled so that a sum over tensor-parallel ranks counts it once."""
    if mask is None or layout.sequence or layout.tensor_size == 1:
        return mask
    return _ScaleGradient.apply(mask, 1.0 / layout.tensor_size)


def stage_masks(
    masks: Masks, live: LiveStage, shape: ModelShape, layout: Layout, layers: range, dtype: torch.dtype
) -> StageMasks:
    """This rank's slices of the masks for the given global layers, of live units alone.

    masks: hidden [D], head [L, H], intermediate [L, F], layer [L], norm_gain [1], each or all of them None. The
    products that masks enter are computed in `dtype`; masks and their gradients stay in their own precision until then.
    """
    hidden = _pick(shared_by_ranks(masks.hidden, layout), live.hidden)
    norm = hidden if hidden is None or masks.norm_gain is None else hidden * masks.norm_gain
    layer_L = shared_by_ranks(masks.layer, layout)
    heads = shape.num_heads // layout.tensor_size
    columns = shape.intermediate_size // layout.tensor_size
    rows = []
    for index, units in zip(layers, live.layers, strict=True):
        branch = hidden
        if layer_L is not None:
            branch = layer_L[index].expand(shape.hidden_size) if hidden is None else layer_L[index] * hidden
        head = None if masks.head is None else _slice(masks.head[index], layout.tensor_rank, heads).to(dtype)
        middle = None if masks.intermediate is None else _slice(masks.intermediate[index], layout.tensor_rank, columns)
        rows.append(
            LayerMasks(
                norm=norm,
                head=_pick(head, units.heads),
                intermediate=_pick(middle, units.intermediate),
                branch=branch,
                live=units,
                live_hidden=live.hidden,
            )
        )
    return StageMasks(hidden, norm, live.hidden, rows)


def _slice(mask: Tensor, rank: int, width: int) -> Tensor:
    return mask[rank * width : (rank + 1) * width]


def _pick(mask: Tensor | None, units: Tensor | None) -> Tensor | None:
    return mask if mask is None or units is None else mask.index_select(0, units)
