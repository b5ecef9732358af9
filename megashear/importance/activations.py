"""Activation criteria: mean activation per unit, block influence and angular distance per layer.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2) with the mean over the sequence, of: |norm output|
for hidden units (mean over both norms of every layer), the L2 norm of a query head's attention output, |input of the
down projection| for intermediate units. A group's value is the sum over its heads. For layers, with cos_t between a
token's residual stream before and after: block influence 1 - mean_t cos_t (ShortGPT, Men et al. 2024, arXiv
2403.03853), angular distance arccos(cos_T) / pi at the last token (Gromov et al. 2024, arXiv 2403.17887).

Forward passes only. A rank returns its part of a sum over tensor- and pipeline-parallel ranks.
Shape suffixes: N this rank's sequences; others as in `model/transformer_layer.py`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.pipeline import run_micro_batches
from megashear.importance.unit_reductions import empty_units
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch
from megashear.model.transformer_layer import Layer, Stream


class Observer:
    """Watches layers during a forward pass; `row` is the sequence that runs."""

    def __init__(self, shape: ModelShape, layout: Layout, sequences: int, length: int) -> None:
        self.shape, self.layout, self.length = shape, layout, length
        self.found = empty_units(shape, (sequences,), layout.device)
        self.row = 0
        # Where every tensor-parallel rank sees whole sequences, each of them counts its share of what all see alike.
        self.share = 1.0 if layout.sequence else 1.0 / layout.tensor_size

    def watch_sizes(self, index: int, layer: Layer, stack: ExitStack) -> None:
        """Sizes of activations in layer `index`."""
        rank, found = self.layout.tensor_rank, self.found

        def norm_output(_: Any, __: Any, output: tuple[Tensor, Tensor]) -> None:
            size_D = wide(output[1]).abs().sum((0, 1), dtype=torch.float64) / self.length
            found["hidden"][self.row] += size_D * (self.share / (2 * self.shape.num_layers))

        def heads(_: Any, __: Any, output_BHSd: Tensor) -> None:
            size_H = wide(output_BHSd).norm(dim=3).sum((0, 2), dtype=torch.float64) / self.length
            first, queries = rank * len(size_H), self.shape.queries_per_group
            number_H = torch.arange(first, first + len(size_H), device=size_H.device)
            found["group"][self.row, index].index_add_(0, number_H // queries, size_H)
            if "query" in found:
                found["query"][self.row, index].view(-1)[number_H] = size_H

        def intermediate(_: Any, __: Any, output_SBF: Tensor) -> None:
            size_F = wide(output_SBF).abs().sum((0, 1), dtype=torch.float64) / self.length
            found["intermediate"][self.row, index, rank * len(size_F) : (rank + 1) * len(size_F)] = size_F

        _on_forward(layer.attention_norm, norm_output, stack)
        _on_forward(layer.mlp_norm, norm_output, stack)
        _on_forward(layer.attention.heads_seen, heads, stack)
        _on_forward(layer.mlp.units_seen, intermediate, stack)

    def watch_turn(self, index: int, layer: Layer, stack: ExitStack, use: Callable[[Tensor], Tensor]) -> None:
        """A layer's value from the cosines [S, B] between its input and its output, of this rank's tokens."""

        def turn(_: Any, inputs: tuple[Stream, ...], output: Stream) -> None:
            before_SBD, after_SBD = inputs[0].total().double(), output.total().double()
            self.found["layer"][self.row, index] += use(cosine_similarity(before_SBD, after_SBD, dim=2)) * self.share

        _on_forward(layer, turn, stack)


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _on_forward(module: torch.nn.Module, hook: Callable[..., None], stack: ExitStack) -> None:
    stack.callback(module.register_forward_hook(hook).remove)


Watch = Callable[[Observer, int, Layer, ExitStack], None]


def observe(
    chunks: Sequence[Llama], batches: list[MicroBatch], shape: ModelShape, layout: Layout, watch: Watch
) -> dict[str, Tensor]:
    """What `watch` has layers note of each of N sequences: granularity -> [N, *shape of its log-alpha] in fp64."""
    length = batches[0].tokens_BS.shape[1]
    observer = Observer(shape, layout, len(batches), length)
    rows = {batch.index: row for row, batch in enumerate(batches)}

    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> Any:
        observer.row = rows[batch.index]
        losses_BS = chunk(batch.tokens_BS, batch.labels_BS, None, None, batch.first_BS)
        return losses_BS, lambda losses_BS: (losses_BS.mean(), None)

    with ExitStack() as stack, torch.no_grad():
        for chunk in chunks:
            for index, layer in chunk.layers.items():
                assert isinstance(layer, Layer)
                watch(observer, int(index), layer, stack)
            chunk.eval()
        run_micro_batches(forward, list(chunks), batches, length, 1, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return observer.found


def activation_sizes(
    chunks: Sequence[Llama], batches: list[MicroBatch], shape: ModelShape, layout: Layout
) -> dict[str, Tensor]:
    """Mean over the sequence of the size of each unit's activation, by granularity; `layer` is left out."""
    found = observe(chunks, batches, shape, layout, Observer.watch_sizes)
    return {name: value for name, value in found.items() if name != "layer"}


def block_influence(
    chunks: Sequence[Llama], batches: list[MicroBatch], shape: ModelShape, layout: Layout
) -> dict[str, Tensor]:
    """`layer`: 1 - the mean over tokens of the cosine between a layer's input and output, [N, L]."""

    def watch(observer: Observer, index: int, layer: Layer, stack: ExitStack) -> None:
        observer.watch_turn(index, layer, stack, lambda cosine_SB: (1.0 - cosine_SB).sum() / observer.length)

    return {"layer": observe(chunks, batches, shape, layout, watch)["layer"]}


def angular_distance(
    chunks: Sequence[Llama], batches: list[MicroBatch], shape: ModelShape, layout: Layout
) -> dict[str, Tensor]:
    """`layer`: the angle between a layer's input and output at the last token, as a share of pi, [N, L]."""
    holds_last = not layout.sequence or layout.tensor_rank == layout.tensor_size - 1

    def angle(cosine_SB: Tensor) -> Tensor:
        return cosine_SB[-1].clamp(-1.0, 1.0).arccos().sum() / math.pi * float(holds_last)

    def watch(observer: Observer, index: int, layer: Layer, stack: ExitStack) -> None:
        observer.watch_turn(index, layer, stack, angle)

    return {"layer": observe(chunks, batches, shape, layout, watch)["layer"]}
