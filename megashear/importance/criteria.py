"""Registry of importance criteria: what each measures on a sequence, and how sequences become a score.

| criterion | value v of a sequence | score over sequences |
|---|---|---|
| magnitude | none: L2 norm of the unit's weights (Han et al. 2015; Li et al. 2017) | |
| taylor_mask | abs(dL/dz) at z = 1 | mean (Michel et al. 2019, arXiv 1905.10650; Molchanov et al. 2019) |
| fisher | (dL/dz)^2 at z = 1 | mean: diagonal of the empirical Fisher (Kwon et al. 2022, arXiv 2204.09656) |
| taylor_weight | sum over the unit's weights of abs(w dL/dw) | mean (LLM-Pruner, Ma et al. 2023, arXiv 2305.11627) |
| activation | mean over the sequence of abs(x) | root of the sum of squares (Minitron) |
| block_influence, angular_distance | of layers: see `activations.py` | mean |

taylor_weight sums absolute products: signed ones would add up to the mask's gradient again, once per matrix of the
unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout
from megashear.hf.tensor_names import tensor_shapes
from megashear.importance import activations, gradients
from megashear.importance.unit_reductions import add_matrix, empty_units, matrix_part
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch
from megashear.model.weight_io import TensorSource


def magnitudes(source: TensorSource, shape: ModelShape) -> dict[str, Tensor]:
    """Norms by granularity, fp64, in the shapes of log-alpha; one matrix in memory at a time."""
    units = empty_units(shape)
    for name, size in tensor_shapes(shape).items():
        if matrix_part(name) is not None:
            add_matrix(units, shape, name, source.read_slice(name, 0, 0, size[0]).double().square())
    return {name: value.sqrt() for name, value in units.items()}


Measure = Callable[[Sequence[Llama], list[MicroBatch], ModelShape, Layout], dict[str, Tensor]]
"""(chunks, this rank's sequences, shape, layout) -> granularity -> this rank's part of a sum, [N, *shape]."""


@dataclass(frozen=True)
class Criterion:
    """How a score comes about; `measure` None: from the weights alone."""

    measure: Measure | None
    value: Callable[[Tensor], Tensor] = torch.Tensor.double
    """From what was measured, summed over ranks, to a sequence's value."""
    root: bool = False
    """The score is the root of the sum of sequences' values, else their mean."""


REGISTRY: dict[str, Criterion] = {
    "magnitude": Criterion(None),
    "taylor_mask": Criterion(gradients.mask_gradients, torch.Tensor.abs),
    "fisher": Criterion(gradients.mask_gradients, torch.Tensor.square),
    "taylor_weight": Criterion(gradients.weight_products),
    "activation": Criterion(activations.activation_sizes, torch.Tensor.square, root=True),
    "block_influence": Criterion(activations.block_influence),
    "angular_distance": Criterion(activations.angular_distance),
}
