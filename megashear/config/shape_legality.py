"""Check which source shape, target shape and layout are compatible.

Pure functions that return a list of messages. Each message names the key to change and the nearest legal values.
"""

import difflib
import math
from collections.abc import Sequence

from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig

PRUNED_KEYS = ("hidden_size", "num_layers", "num_heads", "num_query_groups", "intermediate_size")
INHERITED_KEYS = ("head_dim", "vocab_size", "tie_word_embeddings", "rope_theta", "rope_scaling", "norm_eps")


def granularity_sizes(source: ModelShape, target: ModelShape) -> dict[str, tuple[int, int]]:
    """Return granularity -> (units per row, units kept in the target); `query` only if heads share a group."""
    sizes = {
        "hidden": (source.hidden_size, target.hidden_size),
        "group": (source.num_query_groups, target.num_query_groups),
        "query": (source.queries_per_group, target.queries_per_group),
        "intermediate": (source.intermediate_size, target.intermediate_size),
        "layer": (source.num_layers, target.num_layers),
    }
    if source.queries_per_group == 1:
        del sizes["query"]
    return sizes


def granularity_problems(source: ModelShape, target: ModelShape, granularities: Sequence[str] | None) -> list[str]:
    """Check `prune.granularities` for these shapes: list all that shrink, at least one."""
    sizes = granularity_sizes(source, target)
    shrinking = [name for name, (units, kept) in sizes.items() if kept < units]
    problems = [] if shrinking else ["target: same shape as the source; make at least one size smaller"]
    if granularities is None:
        return problems
    for name in granularities:
        if name in sizes:
            continue
        if name == "query":
            problems.append("prune.granularities: query needs several query heads per group; here group is the head")
            continue
        near = difflib.get_close_matches(name, list(sizes), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"prune.granularities: {name!r} is none of {', '.join(sizes)}{hint}")
    for name in shrinking:
        if name not in granularities:
            units, kept = sizes[name]
            problems.append(
                f"prune.granularities: {name} is missing though the target shrinks it from {units} to {kept}; add it"
            )
    if not granularities:
        problems.append("prune.granularities: the list is empty; unset it to learn every granularity that shrinks")
    return problems


def shape_problems(
    source: ModelShape, target: ModelShape | None, parallel: ParallelConfig, world_size: int | None = None
) -> list[str]:
    """Return every reason why this source cannot be pruned to this target on this layout; empty if it can.

    Args:
        source: Shape of the source.
        target: Shape of the target; None if the run does not prune.
        parallel: The layout.
        world_size: Number of ranks; None skips this check.
    """
    shapes = {"source": source} if target is None else {"source": source, "target": target}
    size_errors = [problem for section, shape in shapes.items() for problem in size_problems(shape, section)]
    problems = layout_problems(parallel, world_size)
    if size_errors:
        return problems + size_errors
    problems += [problem for section, shape in shapes.items() for problem in self_problems(shape, section)]
    layout_is_valid = min(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline) >= 1
    if layout_is_valid:
        problems += source_layout_problems(source, parallel)
    if target is not None:
        problems += target_layout_problems(source, target, parallel) if layout_is_valid else []
        problems += pruning_problems(source, target)
    if target is not None and not problems:
        problems += loading_problems(source, target)
    return problems


def layout_problems(parallel: ParallelConfig, world_size: int | None) -> list[str]:
    """Check the layout independently of any shape."""
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    problems = [
        f"parallel.{key}: {value} is not a size; use 1 or more"
        for key, value in (("tensor", tensor), ("pipeline", pipeline), ("virtual_pipeline", virtual))
        if value < 1
    ]
    if problems:
        return problems
    if parallel.sequence and tensor == 1:
        problems.append("parallel.sequence: it needs parallel.tensor above 1; set it to false or parallel.tensor to 2")
    if virtual > 1 and pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline: {virtual} needs parallel.pipeline above 1; set it to 1, or pipeline to 2"
        )
    replica = tensor * pipeline
    if world_size is not None and (world_size < 1 or world_size % replica):
        problems.append(
            f"parallel.world_size: {world_size} ranks are not divisible by parallel.tensor x parallel.pipeline = "
            f"{replica}; launch {either(near_multiples(world_size, replica))} ranks"
        )
    return problems


def size_problems(shape: ModelShape, section: str) -> list[str]:
    """Check that the sizes of a shape are positive; messages name keys of `section`."""
    keys = ("hidden_size", "num_layers", "num_heads", "num_query_groups", "head_dim", "intermediate_size", "vocab_size")
    return [
        f"{section}.{key}: {getattr(shape, key)} is not a size; use 1 or more"
        for key in keys
        if getattr(shape, key) < 1
    ]


def self_problems(shape: ModelShape, section: str) -> list[str]:
    """Check a shape independently of the layout; messages name keys of `section`."""
    problems = size_problems(shape, section)
    if problems:
        return problems
    if shape.num_heads % shape.num_query_groups:
        legal = nearest(divisors(shape.num_heads), shape.num_query_groups)
        problems.append(
            f"{section}.num_query_groups: {shape.num_query_groups} groups cannot share {shape.num_heads} query heads "
            f"evenly; use {either(legal)}"
        )
    if shape.head_dim % 2:
        problems.append(
            f"{section}.head_dim: {shape.head_dim} is odd, but rotary embeddings rotate pairs; "
            f"use {either([shape.head_dim - 1, shape.head_dim + 1])}"
        )
    return problems


def source_layout_problems(source: ModelShape, parallel: ParallelConfig) -> list[str]:
    """Check that the layout can shard the source; messages suggest another layout."""
    problems = []
    legal = [t for t in range(1, source.num_heads + 1) if not undividable(source, t)]
    for key in undividable(source, parallel.tensor):
        problems.append(
            f"parallel.tensor: the source's {key} {getattr(source, key)} cannot be split over {parallel.tensor} ranks; "
            f"use {either(nearest(legal, parallel.tensor))}"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if source.num_layers < stages:
        problems.append(
            f"parallel.pipeline: pipeline x virtual_pipeline = {stages} stages need at least one layer each, "
            f"and the source has {source.num_layers}; use at most {source.num_layers} stages"
        )
    return problems


def target_layout_problems(source: ModelShape, target: ModelShape, parallel: ParallelConfig) -> list[str]:
    """Check that the layout can shard the target; messages suggest the nearest legal sizes."""
    problems, tensor = [], parallel.tensor
    for key in undividable(target, tensor):
        value, limit = getattr(target, key), getattr(source, key)
        rule = f"not divisible by parallel.tensor {tensor}"
        if key == "num_query_groups":
            rule = f"neither a multiple nor a divisor of parallel.tensor {tensor}"
            advice = legal_groups(source, target, tensor)
        else:
            factor = tensor
            if key == "num_heads" and not groups_undividable(target.num_query_groups, tensor):
                factor = math.lcm(tensor, target.num_query_groups)
            advice = either([near for near in near_multiples(value, factor) if near <= limit])
        problems.append(f"target.{key}: {value} is {rule}; use {advice or 'a smaller parallel.tensor'}")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if target.num_layers < stages <= source.num_layers:
        problems.append(
            f"target.num_layers: {target.num_layers} layers do not fill parallel.pipeline x virtual_pipeline = "
            f"{stages} stages; use at least {stages} layers or at most {target.num_layers} stages"
        )
    return problems


def pruning_problems(source: ModelShape, target: ModelShape) -> list[str]:
    """Check that a target is no larger than the source and equal in inherited properties."""
    problems = []
    for key in PRUNED_KEYS:
        limit, value = getattr(source, key), getattr(target, key)
        if value > limit:
            problems.append(f"target.{key}: {value} is more than the source's {limit}; use {limit} or less")
    queries, kept = source.queries_per_group, target.queries_per_group
    if kept > queries and target.num_heads % target.num_query_groups == 0:
        fewest = -(-target.num_heads // queries)
        legal = [g for g in divisors(target.num_heads) if fewest <= g <= source.num_query_groups]
        advice = either(nearest(legal, fewest)) or f"at most {queries} heads a group"
        problems.append(
            f"target.num_query_groups: {target.num_heads} heads in {target.num_query_groups} groups are {kept} a "
            f"group, and the source has {queries}; use {advice}"
        )
    for key in INHERITED_KEYS:
        limit, value = getattr(source, key), getattr(target, key)
        if value != limit:
            problems.append(
                f"target.{key}: {value} differs from the source's {limit}, which pruning cannot change; unset it"
            )
    return problems


def loading_problems(source: ModelShape, target: ModelShape) -> list[str]:
    """Check that transformers 5 can load the target, which rejects some valid shapes with an explicit head_dim."""
    if target.hidden_size % target.num_heads == 0:
        return []
    legal = [near for near in near_multiples(target.hidden_size, target.num_heads) if near <= source.hidden_size]
    return [
        f"target.hidden_size: {target.hidden_size} is not a multiple of num_heads {target.num_heads}, and transformers "
        f"loads no such LLaMA, whatever its head_dim; use {either(legal) or 'other num_heads'}"
    ]


def undividable(shape: ModelShape, tensor: int) -> list[str]:
    """Return the keys of a shape that tensor parallelism cannot split; groups may also be replicated."""
    keys = [key for key in ("hidden_size", "num_heads", "intermediate_size") if getattr(shape, key) % tensor]
    if groups_undividable(shape.num_query_groups, tensor):
        keys.append("num_query_groups")
    return keys


def groups_undividable(groups: int, tensor: int) -> bool:
    """Return whether key/value heads can be neither split over tensor ranks nor replicated on them."""
    return bool(groups % tensor and tensor % groups)


def legal_groups(source: ModelShape, target: ModelShape, tensor: int) -> str:
    """Format the nearest legal numbers of groups, with the heads that keep the target's heads per group."""
    queries = max(target.queries_per_group, 1)  # 0 if there are fewer heads than groups
    legal = [
        groups
        for groups in range(1, source.num_query_groups + 1)
        if not groups_undividable(groups, tensor) and groups * queries % tensor == 0
    ]
    pairs = nearest(legal, target.num_query_groups)
    return " or ".join(f"{groups} with num_heads {groups * queries}" for groups in pairs)


def near_multiples(value: int, factor: int) -> list[int]:
    """Return the multiples of `factor` just below (if above 0) and just above `value`."""
    below = value // factor * factor
    return [near for near in (below, below + factor) if near > 0]


def nearest(choices: Sequence[int], value: int) -> list[int]:
    """Return the closest choice at most `value` and the closest above it; `choices` ascend."""
    below = [choice for choice in choices if choice <= value]
    above = [choice for choice in choices if choice > value]
    return [*below[-1:], *above[:1]]


def divisors(value: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    return [d for d in range(1, value + 1) if value % d == 0]


def either(values: Sequence[int]) -> str:
    """Format the values as a choice: '4', '4 or 6'."""
    return " or ".join(str(value) for value in values)
