"""Cost of calibration before pruning: tokens, FLOPs, and host memory of the least-squares fit."""

from dataclasses import dataclass

from megashear.config.model_shape import ModelShape
from megashear.config.resolve import refit_batches
from megashear.config.training_schema import ImportanceConfig, PruneConfig

PASSES = {
    "magnitude": 0,
    "activation": 1,
    "block_influence": 1,
    "angular_distance": 1,
    "taylor_mask": 2,
    "fisher": 2,
    "taylor_weight": 3,
}
"""What measuring a criterion costs, in forward passes: 2 with gradients of activations, 3 with those of weights."""


@dataclass(frozen=True)
class CalibrationCost:
    """Cost of calibration: tokens of text, FLOPs of all ranks, bytes of host memory over data-parallel ranks.

    Each tensor-parallel rank keeps as many bytes.
    """

    tokens: int
    flops: float
    host_bytes: int


def criteria_of(config: ImportanceConfig, shape: ModelShape) -> dict[str, str]:
    """Map every granularity of a shape to its criterion.

    Layers have no activation: like Minitron, `activation` scores them by block influence.
    """
    assert config.criterion is not None
    layer = config.layer_criterion or config.criterion
    names = ["hidden", "group", "query", "intermediate"]
    if shape.queries_per_group == 1:
        names.remove("query")
    return dict.fromkeys(names, config.criterion) | {"layer": "block_influence" if layer == "activation" else layer}


def calibration_cost(
    config: PruneConfig, source: ModelShape, target: ModelShape, length: int, principal: bool, precision: str
) -> CalibrationCost:
    """Cost of basis, scores and fit.

    Args:
        prune: Section `prune`.
        source, target: Shapes.
        length: Tokens per sequence.
        principal: Whether hidden units are principal directions.
        precision: Precision of the run.
    """
    passes = int(principal)
    if config.importance.criterion is not None:
        passes += sum(PASSES[one] for one in set(criteria_of(config.importance, source).values()))
    batch, full = config.batch.global_batch * length, source.flops_per_token(length)
    tokens = batch * config.importance.batches if passes else 0
    flops = tokens * passes * full / 3
    fitted = batch * refit_batches(config)
    if fitted:  # a forward pass of the source, two of what stays of it, and sums of outer products
        inputs = (target.intermediate_size, target.num_heads * target.head_dim)
        sums = target.num_layers * sum(2 * size * (size + target.hidden_size) for size in inputs)
        flops += fitted * ((full + 2 * target.flops_per_token(length)) / 3 + sums)
    streams = fitted * (source.hidden_size + target.hidden_size) * (2 if precision == "bf16" else 4)
    return CalibrationCost(max(tokens, fitted), flops, streams)
