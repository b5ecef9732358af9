"""Fit the output matrices of the kept units to the source by least squares, layer after layer.

Pruning removes what the pruned units contributed, and every later layer reads a changed stream. In order, the
attention's o and the MLP's down matrix of the kept units change so that the pruned model's residual stream x approaches
the source's s at the same place, given the kept units h of the pruned model (He et al. 2017, arXiv 1707.06168, of
convolutions):

    W = argmin_W  sum_t |s_t - x_t - W h_t|^2 / mean(s_t^2)  +  ridge |W - W_0|^2

restricted to kept hidden units of s; the weight of a token is that of the next norm. A layer thus also compensates for
earlier layers, including dropped ones. The result does not depend on the layout, except for rounding. Sequences are
kept in host memory. Shape suffixes: as in `model/transformer_layer.py`; lower-case d kept hidden units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megashear.engine.collectives import sum_over_data
from megashear.engine.layout import Layout, stage_layers
from megashear.engine.parallel import gather_features
from megashear.engine.pipeline import from_previous_stage, to_next_stage
from megashear.importance.activations import wide
from megashear.masks.mask_values import Masks
from megashear.model.live_units import live_patterns
from megashear.model.llama import Llama
from megashear.model.masking import LayerMasks, StageMasks
from megashear.model.micro_batch import MicroBatch
from megashear.model.transformer_layer import Layer, Stream

RIDGE = 1e-3
"""Weight of the change itself, in mean squares of an input: what the text does not tell stays as it is."""


class LeastSquares:
    """argmin over W of sum_t w_t |r_t - W h_t|^2 + ridge |W|^2, from its normal equations, whose sums are in fp64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram_FF = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross_FD = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, h_NF: Tensor, rest_ND: Tensor, weight_N: Tensor) -> None:
        """Count N tokens: inputs, what is left of the outputs, weights; all in fp32 or fp64."""
        weighted_NF = h_NF * weight_N[:, None]
        self.gram_FF += (weighted_NF.T @ h_NF).double()
        self.cross_FD += (weighted_NF.T @ rest_ND).double()

    def solve(self) -> Tensor:
        """W [D, F] in fp64, the same on all data-parallel ranks (all of them take part); zeros for inputs of zeros, NaN
        where a sum is not finite or rounding has spoilt the system.
        """
        gram_FF, cross_FD = sum_over_data(self.gram_FF), sum_over_data(self.cross_FD)
        if not bool(gram_FF.isfinite().all() and cross_FD.isfinite().all()):
            return torch.full_like(cross_FD.T, torch.nan)
        size = gram_FF.diagonal().mean()
        if not bool(size > 0):
            return torch.zeros_like(cross_FD.T)
        gram_FF.diagonal().add_(RIDGE * size)
        factor_FF, failed = torch.linalg.cholesky_ex(gram_FF)
        return torch.full_like(cross_FD.T, torch.nan) if bool(failed) else torch.cholesky_solve(cross_FD, factor_FF).T


@dataclass
class Passage:
    """One sequence on its way through both models: the source's stream [S, 1, D] and the pruned model's [S, 1, d]."""

    batch: MicroBatch
    source_SBD: Tensor
    pruned_SBD: Tensor


def refit(
    source: Sequence[Llama],
    pruned: Sequence[Llama],
    layout: Layout,
    masks: Masks,
    batches: Sequence[MicroBatch],
    each: Callable[[int], None] = lambda _: None,
) -> None:
    """Change the weights of `pruned` in place (all ranks take part).

    source, pruned: two copies of this rank's chunks, without sequence parallelism; masks: exactly 1 for what is kept
    and 0 elsewhere; batches: this rank's calibration text, a sequence each; each: called on all ranks together after
    every layer, with the number of layers that are done.
    """
    stages, layers = layout.pipeline_size, source[0].shape.num_layers
    parts = stages * layout.virtual_size
    passages: list[Passage] = []
    with torch.no_grad():
        for part in range(parts):
            owner = replace(layout, pipeline_rank=part % stages)
            own, number = owner == layout, part // stages
            if own:
                fit = ChunkFit(source[number], pruned[number], layout, masks)
                passages = [fit.enter(batch) if part == 0 else fit.receive(batch) for batch in batches]
            for index in stage_layers(layers, owner, number):
                if own:
                    fit.layer(index, passages)
                each(index + 1)
            if own and part + 1 < parts:
                hand_on(passages, layout)


def hand_on(passages: list[Passage], layout: Layout) -> None:
    """Send all sequences to the next stage, and forget each as it is sent."""
    passages.reverse()
    while passages:
        one = passages.pop()
        to_next_stage(one.source_SBD.to(layout.device))
        to_next_stage(one.pruned_SBD.to(layout.device))


class ChunkFit:
    """Fits the layers of one model chunk."""

    def __init__(self, source: Llama, pruned: Llama, layout: Layout, masks: Masks) -> None:
        self.source, self.pruned, self.layout, self.masks = source, pruned, layout, masks
        self.whole: StageMasks = source.stage(None, None)
        self.stage: StageMasks = pruned.stage(masks, live_patterns([masks])[0])
        hidden, live = masks.hidden, self.stage.live_hidden
        self.open_D = None if hidden is None else hidden if live is None else hidden.index_select(0, live)

    def enter(self, batch: MicroBatch) -> Passage:
        """A sequence's embeddings."""
        source_SBD = self.source.enter(batch.tokens_BS, self.whole)
        return self._passage(batch, source_SBD, self.pruned.enter(batch.tokens_BS, self.stage))

    def receive(self, batch: MicroBatch) -> Passage:
        """A sequence's streams from the stage before."""
        length, width = batch.tokens_BS.shape[1], self.source.shape.hidden_size
        live = width if self.stage.live_hidden is None else len(self.stage.live_hidden)
        dtype, device = self.source.config.params_dtype, self.layout.device
        streams = [torch.empty(length, 1, size, dtype=dtype, device=device) for size in (width, live)]
        return self._passage(batch, *(from_previous_stage(stream) for stream in streams))

    @staticmethod
    def _passage(batch: MicroBatch, source_SBD: Tensor, pruned_SBD: Tensor) -> Passage:
        return Passage(batch, source_SBD.cpu(), pruned_SBD.cpu())

    def layer(self, index: int, passages: list[Passage]) -> None:
        """Take all sequences through layer `index` of both models, fitting the pruned one's outputs on the way."""
        place = index - self.source.layer_range.start
        source, pruned = (chunk.layers[str(index)] for chunk in (self.source, self.pruned))
        assert isinstance(source, Layer) and isinstance(pruned, Layer)
        whole, masks = self.whole.layers[place], self.stage.layers[place]
        for attention in (True, False):
            for one in passages:
                one.source_SBD = self._run(source, attention, one, one.source_SBD, whole).cpu()
            if not (masks.live.attention if attention else masks.live.mlp):
                continue
            self._fit(index, pruned, attention, passages, masks)
            for one in passages:
                one.pruned_SBD = self._run(pruned, attention, one, one.pruned_SBD, masks).cpu()

    def _run(self, layer: Layer, attention: bool, one: Passage, x_SBD: Tensor, masks: LayerMasks) -> Tensor:
        """The stream behind one branch of a layer."""
        stream = Stream(x_SBD.to(self.layout.device))
        if attention:
            rope = self.source.rope(one.batch.tokens_BS.shape[1])
            return layer.attend(stream, rope, masks, one.batch.first_BS).total()
        return layer.transform(stream, masks).total()

    def _fit(self, index: int, layer: Layer, attention: bool, passages: list[Passage], masks: LayerMasks) -> None:
        """Fit the output matrix of one branch."""
        branch = layer.attention if attention else layer.mlp
        seen_by = layer.attention.heads_seen if attention else layer.mlp.units_seen
        matrix = layer.attention.out.weight if attention else layer.mlp.down.weight
        local = masks.live.out_columns if attention else masks.live.intermediate
        assert isinstance(matrix, torch.nn.Parameter) and isinstance(branch, torch.nn.Module)
        columns_F = self._open_columns(index, attention, matrix.shape[1] * self.layout.tensor_size)
        live = self.stage.live_hidden
        rows_D = torch.arange(len(matrix), device=matrix.device) if live is None else live
        problem = LeastSquares(len(columns_F), len(rows_D), self.layout.device)
        seen: list[Tensor] = []
        handle = seen_by.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            for one in passages:
                after_SBD = self._run(layer, attention, one, one.pruned_SBD, masks)
                given = seen.pop()
                h_SBF = given.permute(2, 0, 1, 3).flatten(2) if attention else given
                h_NF = self._all_ranks(h_SBF, local, matrix.shape[1]).flatten(0, 1).index_select(1, columns_F)
                problem.add(wide(h_NF), *self._rest(one, after_SBD))
        finally:
            handle.remove()
        first = matrix.shape[1] * self.layout.tensor_rank
        own = (columns_F >= first) & (columns_F < first + matrix.shape[1])
        change_DF = problem.solve()[:, own].to(matrix.dtype)
        matrix[rows_D[:, None], columns_F[own] - first] += change_DF

    def _rest(self, one: Passage, after_SBD: Tensor) -> tuple[Tensor, Tensor]:
        """What the pruned model's stream lacks, [N, d], and the weight [N] of each token."""
        wanted_SBD = one.source_SBD.to(self.layout.device)
        if self.stage.live_hidden is not None:
            wanted_SBD = wanted_SBD.index_select(-1, self.stage.live_hidden)
        wanted_ND = wide(wanted_SBD).flatten(0, 1)
        if self.open_D is not None:
            wanted_ND = wanted_ND * self.open_D
        weight_N = 1.0 / (wanted_ND.square().mean(1) + self.source.shape.norm_eps)
        return wanted_ND - wide(after_SBD).flatten(0, 1), weight_N

    def _open_columns(self, index: int, attention: bool, width: int) -> Tensor:
        """Columns of the whole output matrix whose unit is kept, ascending."""
        mask = self.masks.head if attention else self.masks.intermediate
        if mask is None:
            return torch.arange(width, device=self.layout.device)
        repeats = self.source.shape.head_dim if attention else 1
        return mask[index].repeat_interleave(repeats).nonzero().flatten().to(self.layout.device)

    def _all_ranks(self, h_SBF: Tensor, local: Tensor | None, width: int) -> Tensor:
        """What all units give, [S, B, F], of tensor-parallel ranks side by side; zeros for those that are left out."""
        if local is not None:
            h_SBF = h_SBF.new_zeros(*h_SBF.shape[:-1], width).index_copy(-1, local, h_SBF)
        return gather_features(h_SBF) if self.layout.tensor_size > 1 else h_SBF
