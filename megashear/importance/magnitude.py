"""Magnitude: the Euclidean norm of a unit's weights (Han et al. 2015, for whole units: Li et al. 2017, L2 for L1).

score(unit) = sqrt(sum over the unit's weights of w^2), in fp64; no text is needed, so there is no error. Read next:
`units.py`, which says what a unit's weights are.
"""

from torch import Tensor

from megashear.config.shape import ModelShape
from megashear.importance.units import add_matrix, empty_units, matrix_part
from megashear.model.load import TensorSource
from megashear.weights.names import tensor_shapes


def magnitudes(source: TensorSource, shape: ModelShape) -> dict[str, Tensor]:
    """Norms by granularity, fp64, in the shapes of log-alpha; one matrix in memory at a time."""
    units = empty_units(shape)
    for name, size in tensor_shapes(shape).items():
        if matrix_part(name) is not None:
            add_matrix(units, shape, name, source.read_slice(name, 0, 0, size[0]).double().square())
    return {name: value.sqrt() for name, value in units.items()}
