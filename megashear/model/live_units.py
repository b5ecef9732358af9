"""Compute only the rows and columns of each product whose mask is not zero.

A mask of exactly 0 makes its unit's output, the gradients of its weights and, through the clamp, the gradient of its
log-alpha exactly 0. The unit is omitted from every product, and only rounding changes. The pattern of zeros is fetched
from the device once for all micro-batches of a step. Counts are rounded up to multiples that the hardware prefers.

`live_product` gathers the computed part of a weight before the product and again before its backward pass, so no
micro-batch in flight holds a copy; its gradient is added to the weight's fp32 buffer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.parallel import parallel_product
from megashear.masks.mask_values import Masks

MULTIPLE = {"cpu": 16, "cuda": 64}
"""Hidden and intermediate units are kept in such multiples: a vector of 16 floats, a tile of the tensor cores."""
LEAST_SAVED = 1 / 32
"""A dimension that would shrink by less stays whole: gathering costs about that share of a product's time."""


@dataclass(frozen=True)
class LivePattern:
    """Whether each mask of a micro-batch is not 0, on the host; None stands for all."""

    hidden: np.ndarray | None  # [D] bool
    head: np.ndarray | None  # [L, H] bool
    intermediate: np.ndarray | None  # [L, F] bool
    layer: np.ndarray | None  # [L] bool


WHOLE = LivePattern(None, None, None, None)
"""Nothing is left out."""


@dataclass(frozen=True)
class LiveLayer:
    """What one layer computes on one rank; None is all of them, and `attention`, `mlp` False a branch that is left out.

    Query heads stand group by group, `queries` in each of `groups`.
    """

    attention: bool = True
    mlp: bool = True
    groups: int = 0
    queries: int = 0
    heads: Tensor | None = None  # [groups * queries] of this rank's query heads
    qkv_rows: Tensor | None = None  # rows of the fused product
    out_columns: Tensor | None = None  # columns of the product after attention
    intermediate: Tensor | None = None  # [f] of this rank's intermediate units
    gate_up_rows: Tensor | None = None  # rows of the fused product


@dataclass(frozen=True)
class LiveStage:
    """What a model chunk computes: the residual stream's live dimensions [d], and its layers."""

    hidden: Tensor | None
    layers: list[LiveLayer]


def live_patterns(masks: Sequence[Masks]) -> list[LivePattern]:
    """The patterns of several micro-batches, with one transfer from the device."""
    if not masks:
        return []
    names = [name for name, value in vars(masks[0]).items() if value is not None]
    if not names:
        return [WHOLE for _ in masks]
    shapes = [getattr(masks[0], name).shape for name in names]
    flat = torch.stack([torch.cat([getattr(m, name).detach().flatten() != 0 for name in names]) for m in masks])
    rows = flat.cpu().numpy()
    ends = np.cumsum([shape.numel() for shape in shapes])[:-1]
    found = []
    for row in rows:
        parts = {n: part.reshape(shape) for n, part, shape in zip(names, np.split(row, ends), shapes, strict=True)}
        found.append(LivePattern(**{name: parts.get(name) for name in ("hidden", "head", "intermediate", "layer")}))
    return found


def flops_share(pattern: LivePattern, shape: ModelShape, sequence_length: int) -> float:
    """FLOPs of the live units as a share of the whole model's (`ModelShape.flops_per_token`), before rounding up."""
    dims = shape.hidden_size if pattern.hidden is None else int(pattern.hidden.sum())
    queries, d = shape.queries_per_group, shape.head_dim
    total = shape.vocab_size * dims
    for index in range(shape.num_layers):
        if pattern.layer is not None and not pattern.layer[index]:
            continue
        live_H = np.ones(shape.num_heads, dtype=bool) if pattern.head is None else pattern.head[index]
        heads, groups = int(live_H.sum()), int(live_H.reshape(-1, queries).any(1).sum())
        units = shape.intermediate_size if pattern.intermediate is None else int(pattern.intermediate[index].sum())
        total += dims * (2 * d * (heads + groups) + 3 * units) + sequence_length * heads * d
    return 6 * total / shape.flops_per_token(sequence_length)


def kept(live: np.ndarray, multiple: int) -> np.ndarray | None:
    """Ascending indices of the live units and of as many others as round their number up; None where all stay."""
    size, alive = len(live), np.flatnonzero(live)
    wanted = min(size, max(1, -(-len(alive) // multiple)) * multiple)
    if size - wanted <= LEAST_SAVED * size:
        return None
    return np.sort(np.concatenate([alive, np.flatnonzero(~live)[: wanted - len(alive)]]))


def kept_heads(live_GQ: np.ndarray) -> np.ndarray | None:
    """The query heads [g, q] that are computed: as many in each group that has a live one; None where all stay."""
    groups = np.flatnonzero(live_GQ.any(1))
    if not len(groups):
        groups = np.zeros(1, dtype=np.int64)
    queries = max(1, int(live_GQ[groups].sum(1).max()))
    if (len(groups), queries) == live_GQ.shape:
        return None
    # Live heads first, in their order, then as many dead ones as the fullest group needs.
    order = np.argsort(~live_GQ[groups], axis=1, kind="stable")[:, :queries]
    kept: np.ndarray = groups[:, None] * live_GQ.shape[1] + np.sort(order, axis=1)
    return kept


class LivePlanner:
    """Finds a chunk's live units from a pattern; the indices of a chunk go to the device in one transfer."""

    def __init__(self, shape: ModelShape, layout: Layout, layers: range) -> None:
        self.shape, self.layout, self.layers = shape, layout, layers
        self.multiple = MULTIPLE[layout.device.type]

    def __call__(self, pattern: LivePattern) -> LiveStage:
        """The live units of this chunk's layers under a micro-batch's masks."""
        hidden = None if pattern.hidden is None else kept(pattern.hidden, self.multiple)
        plans = [self._layer(pattern, index) for index in self.layers]
        arrays = [hidden, *(array for _, indices in plans for array in indices.values())]
        tensors = iter(_to_device(arrays, self.layout.device))
        first = next(tensors)
        named: list[dict[str, Any]] = [{name: next(tensors) for name in indices} for _, indices in plans]
        layers = [replace(layer, **found) for (layer, _), found in zip(plans, named, strict=True)]
        return LiveStage(first, layers)

    @cached_property
    def _whole(self) -> LiveLayer:
        """A layer that computes everything."""
        groups = max(1, self.shape.num_query_groups // self.layout.tensor_size)
        return LiveLayer(groups=groups, queries=self.shape.num_heads // self.layout.tensor_size // groups)

    def _layer(self, pattern: LivePattern, index: int) -> tuple[LiveLayer, dict[str, np.ndarray | None]]:
        """Sizes of one layer, and its indices by the fields of `LiveLayer` that they fill."""
        runs = pattern.layer is None or bool(pattern.layer[index])
        heads = None if pattern.head is None else pattern.head[index]
        columns = None if pattern.intermediate is None else pattern.intermediate[index]
        # A branch is left out where no rank has a live unit: all ranks of a product's collectives agree.
        attention = runs and (heads is None or bool(heads.any()))
        mlp = runs and (columns is None or bool(columns.any()))
        layer = replace(self._whole, attention=attention, mlp=mlp)
        indices: dict[str, np.ndarray | None] = {}
        if attention and heads is not None:
            layer, indices = self._heads(self._share(heads), layer)
        if mlp and columns is not None:
            width = len(columns) // self.layout.tensor_size
            live = kept(self._share(columns), self.multiple)
            indices["intermediate"] = live
            indices["gate_up_rows"] = None if live is None else np.concatenate([live, live + width])
        return layer, indices

    def _heads(self, live_H: np.ndarray, whole: LiveLayer) -> tuple[LiveLayer, dict[str, np.ndarray | None]]:
        """Heads, rows of q, k, v [G, q + 2, d] and columns of o [H, d] that a rank's live heads need."""
        d, queries = self.shape.head_dim, whole.queries
        chosen = kept_heads(live_H.reshape(whole.groups, queries))
        if chosen is None:
            return whole, {}
        heads = chosen.reshape(-1)
        indices: dict[str, np.ndarray | None] = {"heads": heads, "out_columns": _elements(heads, d)}
        if self.shape.num_query_groups >= self.layout.tensor_size:  # else ranks share the rows of a group
            group = chosen[:, :1] // queries
            key, value = np.full_like(group, queries), np.full_like(group, queries + 1)
            slots = np.concatenate([chosen % queries, key, value], axis=1)
            indices["qkv_rows"] = _elements((group * (queries + 2) + slots).reshape(-1), d)
        return replace(whole, groups=chosen.shape[0], queries=chosen.shape[1]), indices

    def _share(self, live: np.ndarray) -> np.ndarray:
        """This tensor-parallel rank's part."""
        width = len(live) // self.layout.tensor_size
        return live[self.layout.tensor_rank * width : (self.layout.tensor_rank + 1) * width]


def _elements(heads: np.ndarray, head_dim: int) -> np.ndarray:
    """The elements of whole heads."""
    return (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)


def _to_device(arrays: list[np.ndarray | None], device: torch.device) -> list[Tensor | None]:
    """Indices as int64 tensors: parts of one tensor that is sent once."""
    present = [array for array in arrays if array is not None]
    if not present:
        return [None] * len(arrays)
    packed = torch.from_numpy(np.concatenate(present).astype(np.int64, copy=False))
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = iter(packed.split([len(array) for array in present]))
    return [None if array is None else next(parts) for array in arrays]


class _LiveWeight(torch.autograd.Function):
    """weight[rows][:, columns]; the gradient is added where it belongs."""

    apply: ClassVar[Callable[..., Tensor]]  # untyped in torch

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.weight, ctx.rows, ctx.columns = weight, rows, columns
        return ops.live_gather(weight.detach(), rows, columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        # The buffer of megatron-core's DistributedDataParallel, which adds what autograd brings: here nothing.
        total = getattr(ctx.weight, "main_grad", None)
        if total is not None:
            ops.live_add(total, ctx.rows, ctx.columns, gradient)
            return None, None, None
        total = torch.zeros_like(ctx.weight, memory_format=torch.contiguous_format)
        ops.live_add(total, ctx.rows, ctx.columns, gradient)
        return total, None, None


def live_product(
    linear: nn.Module, x: Tensor, rows: Tensor | None, columns: Tensor | None, weight: Tensor | None = None
) -> Tensor:
    """x times the live part of a column- or row-parallel linear's weight, transposed.

    x: [.., columns]; rows, columns: int64, ascending, None for all; weight: [rows, columns] in place of the linear's
    own. Returns [.., rows], summed over tensor-parallel ranks by a row-parallel linear.
    """
    full = linear.weight if weight is None else weight
    assert isinstance(full, Tensor)
    if rows is None and columns is None:
        return parallel_product(linear, x, full, fused=True)
    live = _LiveWeight.apply(full, rows, columns)
    at, shape = live.data_ptr(), live.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == at and saved.shape == shape else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return ops.live_gather(full.detach(), rows, columns) if kept is None else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return parallel_product(linear, x, live, fused=False)
