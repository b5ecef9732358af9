"""Sums over the weights of a unit.

The weights of a unit are the rows and columns removed with it: for a hidden unit the columns of q, k, v, gate, up and
the rows of o, down in every layer; for an intermediate unit its rows of gate, up and its column of down; for a query
head its rows of q and columns of o; for a group those of its heads and its rows of k, v; for a layer all its matrices.
Norms, embedding and output layer are excluded. Tensor-parallel ranks each sum the slices they hold.
"""

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape

HEADS, GROUPS, INTERMEDIATE = ("q_proj", "o_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
INTO_RESIDUAL = ("o_proj", "down_proj")
"""Their rows are hidden units and their columns the branch's; of the others it is the other way round."""
PARTS = (*HEADS, *GROUPS, *INTERMEDIATE)


def empty_units(shape: ModelShape, rows: tuple[int, ...] = (), device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Zeros in fp64 for every granularity, [*rows, *shape of its log-alpha]."""
    layers, groups, queries = shape.num_layers, shape.num_query_groups, shape.queries_per_group
    sizes = {
        "hidden": (shape.hidden_size,),
        "group": (layers, groups),
        "query": (layers, groups, queries),
        "intermediate": (layers, shape.intermediate_size),
        "layer": (layers,),
    }
    if queries == 1:
        del sizes["query"]
    return {name: torch.zeros(*rows, *size, dtype=torch.float64, device=device) for name, size in sizes.items()}


def matrix_part(name: str) -> tuple[int, str] | None:
    """Layer and part (`q_proj`, ..) of a Hugging Face name, None for a tensor that belongs to no unit."""
    pieces = name.split(".")
    part = pieces[-2]
    return (int(pieces[2]), part) if part in PARTS and pieces[1] == "layers" else None


def add_matrix(
    units: dict[str, Tensor], shape: ModelShape, name: str, value: Tensor, row: int = 0, column: int = 0
) -> None:
    """Add a value of each weight to the units that the weight belongs to.

    value: [rows, columns], a slice that starts at `row`, `column` of the tensor with the Hugging Face name `name`;
    units: as `empty_units` makes them, added to in place.
    """
    found = matrix_part(name)
    if found is None:
        return
    layer, part = found
    row_sum, column_sum = value.sum(1, dtype=torch.float64), value.sum(0, dtype=torch.float64)
    out_of_residual = part not in INTO_RESIDUAL
    hidden, branch = (column_sum, row_sum) if out_of_residual else (row_sum, column_sum)
    hidden_at, branch_at = (column, row) if out_of_residual else (row, column)
    units["hidden"][hidden_at : hidden_at + len(hidden)] += hidden
    units["layer"][layer] += row_sum.sum()
    if part in INTERMEDIATE:
        units["intermediate"][layer, branch_at : branch_at + len(branch)] += branch
        return
    number = (branch_at + torch.arange(len(branch), device=branch.device)) // shape.head_dim
    if part in GROUPS:
        units["group"][layer].index_add_(0, number, branch)
        return
    units["group"][layer].index_add_(0, number // shape.queries_per_group, branch)
    if "query" in units:
        units["query"][layer].view(-1).index_add_(0, number, branch)
