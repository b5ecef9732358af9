"""Gradient criteria: gradient of the loss with respect to masks at 1, and to weights, per sequence.

Weights are not changed, and no optimizer is needed. A rank returns its part of a sum over tensor- and pipeline-parallel
ranks. The loss is a sequence's mean over its tokens, so values do not depend on how sequences are grouped.
Shape suffixes: N this rank's sequences.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.pipeline import run_micro_batches
from megashear.importance.activations import wide
from megashear.importance.unit_reductions import add_matrix, empty_units, matrix_part
from megashear.masks.mask_values import Masks
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch
from megashear.model.tensor_placement import Piece, chunk_pieces


def mask_gradients(
    chunks: Sequence[Llama], batches: list[MicroBatch], shape: ModelShape, layout: Layout
) -> dict[str, Tensor]:
    """dL/dz at z = 1 for each of N sequences: granularity -> [N, *shape of its log-alpha], this rank's part.

    L: a sequence's loss. A query head's mask is group mask times query mask, so a group's gradient is the sum over its
    heads. No gradient of a weight is kept.
    """
    masks = [_open_masks(shape, layout.device, chunks[0].config.params_dtype) for _ in batches]
    by_index = {batch.index: one for batch, one in zip(batches, masks, strict=True)}

    def forward(batch: MicroBatch, chunk: Llama) -> Any:
        return chunk(batch.tokens_BS, batch.labels_BS, by_index[batch.index], None, batch.first_BS), _sequence_loss

    with _only_trainable(chunks, frozenset()):
        _run(forward, chunks, batches)
    # The schedule divides each loss by the number of its micro-batches.
    found = {
        name: torch.stack([_gradient(getattr(one, name)) for one in masks]).double() * len(batches)
        for name in ("hidden", "head", "intermediate", "layer")
    }
    head = found.pop("head").unflatten(2, (shape.num_query_groups, shape.queries_per_group))
    found["group"] = head.sum(3)
    return found | ({"query": head} if shape.queries_per_group > 1 else {})


def weight_products(
    chunks: Sequence[Llama], batches: list[MicroBatch], shape: ModelShape, layout: Layout
) -> dict[str, Tensor]:
    """Sum over a unit's weights of |w dL/dw| for each of N sequences; as `mask_gradients`.

    Each gradient is used and dropped as soon as backward has it, so no more than one is in memory.
    """
    found = empty_units(shape, (len(batches),), layout.device)
    with ExitStack() as stack:
        names: set[str] = set()
        for chunk in chunks:
            names |= _watch_weights(chunk, found, len(batches), stack)
        stack.enter_context(_only_trainable(chunks, names))
        _run(_loss_of_sequences, chunks, batches)
    return {name: value * len(batches) for name, value in found.items()}


def _watch_weights(chunk: Llama, found: dict[str, Tensor], count: int, stack: ExitStack) -> set[str]:
    """Have each matrix of the chunk's layers add its products to the row of the sequence whose backward pass runs.

    A chunk's backward passes come in the order of its micro-batches. Returns the names of the matrices.
    """
    pieces = chunk_pieces(chunk.shape, chunk.layout, chunk.layer_range, chunk.pre_process, chunk.post_process)
    watched = set()
    for name, parameter in chunk.named_parameters():
        if not any(matrix_part(piece.name) for piece in pieces.get(name, [])):
            continue
        rows = iter(range(count))

        def use(weight: Tensor, own: list[Piece] = pieces[name], rows: Iterator[int] = rows) -> None:
            at = next(rows)
            assert weight.grad is not None
            product = (wide(weight.detach()) * wide(weight.grad)).abs()
            weight.grad = None
            units, start = {granularity: value[at] for granularity, value in found.items()}, 0
            for piece in own:
                count = piece.stop - piece.start if piece.dim == 0 else len(product)
                row, column = (piece.start, 0) if piece.dim == 0 else (0, piece.start)
                add_matrix(units, chunk.shape, piece.name, product[start : start + count], row, column)
                start += count

        stack.callback(parameter.register_post_accumulate_grad_hook(use).remove)
        watched.add(name)
    return watched


def _open_masks(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Masks:
    """Masks of ones, leaves of the graph."""
    wide = torch.promote_types(dtype, torch.float32)

    def ones(*size: int) -> Tensor:
        return torch.ones(size, dtype=wide, device=device, requires_grad=True)

    layers = shape.num_layers
    head, intermediate = ones(layers, shape.num_heads), ones(layers, shape.intermediate_size)
    return Masks(ones(shape.hidden_size), head, intermediate, ones(layers))


def _gradient(mask: Tensor) -> Tensor:
    return torch.zeros_like(mask) if mask.grad is None else mask.grad


@contextmanager
def _only_trainable(chunks: Sequence[Llama], names: frozenset[str] | set[str]) -> Iterator[None]:
    """Have autograd keep gradients of these parameters alone; the others are as they were afterwards."""
    parameters = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
    before = [parameter.requires_grad for _, parameter in parameters]
    try:
        for name, parameter in parameters:
            parameter.requires_grad_(name in names)
        yield
    finally:
        for (_, parameter), required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _loss_of_sequences(batch: MicroBatch, chunk: Llama) -> Any:
    return chunk(batch.tokens_BS, batch.labels_BS, None, None, batch.first_BS), _sequence_loss


def _sequence_loss(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses_BS.mean()
    return loss, loss.detach().clone()


def _run(forward: Any, chunks: Sequence[Llama], batches: list[MicroBatch]) -> None:
    """Micro-batches of one sequence through the layout's schedule."""
    run_micro_batches(forward, list(chunks), batches, batches[0].tokens_BS.shape[1], 1)
