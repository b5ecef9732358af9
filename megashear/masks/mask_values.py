"""`Masks`: mask values in the form that layers use.

Tensors that carry autograd to log-alpha. None is a mask of ones (a granularity that is not learned).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape


@dataclass(frozen=True)
class Masks:
    """Mask values of one micro-batch, each in [0, 1], for the whole model (a rank takes its slices)."""

    hidden: Tensor | None = None
    """[d], shared by the residual stream everywhere."""
    head: Tensor | None = None
    """[L, H], one per query head: group mask times query mask."""
    intermediate: Tensor | None = None
    """[L, I]."""
    layer: Tensor | None = None
    """[L], shared by attention and MLP of a layer."""
    norm_gain: Tensor | None = None
    """[1], by which norms multiply besides the hidden mask, or none; see `norm_gain` below."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Masks":
        """The same masks on a device; `dtype` None keeps theirs."""
        return Masks(*(None if mask is None else mask.to(device, dtype) for mask in vars(self).values()))

    def arrays(self) -> dict[str, Any]:
        """Existing masks as numpy arrays by name, without the gain of norms."""
        names = ("hidden", "head", "intermediate", "layer")
        return {name: mask.cpu().numpy() for name in names if (mask := getattr(self, name)) is not None}


def assemble(values: Mapping[str, Tensor], source: ModelShape, principal: bool = False) -> Masks:
    """Masks from the values of the learned granularities (in the shapes of their log-alpha).

    The mask of query head h in a layer is group[h // q] * query[h // q, h % q], with q query heads per group.
    `principal`: hidden units are principal directions, so norms have a gain.
    """
    group, query = values.get("group"), values.get("query")
    head = None
    if group is not None:
        head = group.repeat_interleave(source.queries_per_group, dim=1)
    if query is not None:
        flat = query.reshape(source.num_layers, source.num_heads)
        head = flat if head is None else head * flat
    hidden = values.get("hidden")
    gain = norm_gain(hidden) if principal and hidden is not None else None
    return Masks(hidden, head, values.get("intermediate"), values.get("layer"), gain)


@torch.no_grad()
def norm_gain(hidden_D: Tensor) -> Tensor:
    """sqrt(D / number of hidden units that are not closed), [1]: keeps the scale of the remaining units in norms.

    A norm divides by the root mean square over open units. Closed principal directions contribute almost nothing to the
    sum of squares but count in the mean, so without a gain every norm's output would shrink. The source's own units
    carry about their share of the squares, and need no gain.
    """
    return (hidden_D.numel() / (hidden_D != 0).sum().to(hidden_D.dtype)).sqrt().view(1)
