"""Principal directions of the residual stream.

Coordinates of a residual stream are an accident of training, and all carry about as much. The last principal directions
carry almost nothing (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024). The basis is that of the covariance, about 0,
of what norms read: x / rms(x), averaged over tokens and all norms. Directions of nearly equal variance are arbitrary
within the space they span, so they can differ between layouts. Shape suffixes as in `activations.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.engine.collectives import max_over_world, sum_over_world
from megashear.engine.layout import Layout
from megashear.engine.pipeline import run_micro_batches
from megashear.mixture.loader import Loader
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches
from megashear.model.transformer_layer import Layer, Norm

MASSIVE = 10.0
"""Times the root of the mean square over a token's units, from which on an activation is massive."""
BAND = 0.1
"""Of SmolLM2-135M's 576 units 489 lie within it; giving them one weight raises its loss by 0.006."""


@dataclass(frozen=True)
class ResidualStream:
    """What norms read, x / rms(x), over calibration tokens and all norms; fp64, equal on every rank."""

    covariance_DD: Tensor
    """Mean of outer products."""
    peak_D: Tensor
    """Largest size of each unit."""


def residual_stream(
    chunks: Sequence[Llama],
    layout: Layout,
    loader: Loader,
    batches: int,
    global_batch: int,
    each: Callable[[int], None] = lambda _: None,
) -> ResidualStream:
    """Moments of the normalised residual stream (all ranks take part).

    chunks: of the model, whose weights stay; global_batch: sequences of a batch, divisible among data-parallel ranks;
    each: called after every batch.
    """
    shape, rows = chunks[0].shape, local_rows(global_batch, layout, 1)
    sum_DD = torch.zeros(shape.hidden_size, shape.hidden_size, dtype=torch.float64, device=layout.device)
    peak_D = torch.zeros_like(sum_DD[0])
    # Where every tensor-parallel rank sees whole sequences, each of them counts its share of what all see alike.
    share = 1.0 if layout.sequence else 1.0 / layout.tensor_size

    def add(norm: Norm, _: Any, output: tuple[Tensor, Tensor]) -> None:
        stream_SBD = output[0]
        wide_ND = stream_SBD.flatten(0, 1).to(torch.promote_types(stream_SBD.dtype, torch.float32))
        unit_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(1, keepdim=True) + norm.eps)
        sum_DD.add_((unit_ND.T @ unit_ND).double(), alpha=share)
        torch.maximum(peak_D, unit_ND.abs().amax(0), out=peak_D)

    for number in range(batches):
        samples, _ = loader.read(loader.stream.next_batch(global_batch), rows.numpy())
        with ExitStack() as stack, torch.no_grad():
            for norm in _norms(chunks):
                stack.callback(norm.register_forward_hook(add).remove)
            _forward(chunks, micro_batches(samples, layout, 1, layout.device, loader.separator))
        each(number + 1)
    seen = batches * global_batch * loader.sequence_length * (2 * shape.num_layers + 1)
    return ResidualStream(sum_over_world(sum_DD).div_(seen), max_over_world(peak_D))


def _norms(chunks: Sequence[Llama]) -> list[Norm]:
    layers = [layer for chunk in chunks for layer in chunk.layers.values() if isinstance(layer, Layer)]
    finals = [chunk.norm for chunk in chunks if chunk.post_process]
    return [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)] + finals


def _forward(chunks: Sequence[Llama], batches: list[MicroBatch]) -> None:
    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> Any:
        losses_BS = chunk(batch.tokens_BS, batch.labels_BS, None, None, batch.first_BS)
        return losses_BS, lambda losses_BS: (losses_BS.mean(), None)

    run_micro_batches(forward, list(chunks), batches, batches[0].tokens_BS.shape[1], 1, forward_only=True)


def principal_basis(covariance_DD: Tensor, axes_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Variances [D], falling, and their directions as columns [D, D], both fp64 on the covariance's device.

    A direction's sign, which is free, is the one that makes its largest component positive. axes_D: bool, units that
    stay directions of their own; the others turn among themselves.
    """
    axes_D = torch.zeros(len(covariance_DD), dtype=torch.bool) if axes_D is None else axes_D
    turned = (~axes_D).nonzero().flatten().to(covariance_DD.device)
    own_DD = torch.eye(len(covariance_DD), dtype=torch.float64, device=covariance_DD.device)
    variance_D, basis_DD = covariance_DD.diag().clone(), own_DD.clone()
    variance_D[turned], basis_DD[turned[:, None], turned] = torch.linalg.eigh(covariance_DD[turned[:, None], turned])
    variance_D, order_D = variance_D.clamp(min=0.0).sort(descending=True, stable=True)
    basis_DD = basis_DD[:, order_D]
    largest_1D = basis_DD.gather(0, basis_DD.abs().argmax(0, keepdim=True))
    return variance_D, basis_DD * largest_1D.sign()


def massive_units(peak_D: Tensor) -> Tensor:
    """Units whose activations are massive for some token, bool [D].

    Such activations (Sun et al. 2024, arXiv 2402.17762) may be thousands of times larger than the others: spread over
    directions they would take these directions' digits with them. They stay directions of their own.
    """
    return peak_D > MASSIVE


def unlike_units(norm_D: Tensor) -> Tensor:
    """Units of a tied model that have to stay directions of their own, bool [D], by its final norm's weight.

    That weight cannot go into the output layer, which is the embedding. Units whose weights are the mean's may turn
    among each other; those within BAND of the median are taken to be, and get the mean.
    """
    median = norm_D.median()
    return (norm_D - median).abs() > BAND * median.abs()


def turned_norm(norm_D: Tensor, axes_D: Tensor, basis_DD: Tensor) -> Tensor:
    """The final norm's weight [D] of a tied model in the basis: that of units that stay, for all others their mean."""
    return basis_DD.T.square() @ torch.where(axes_D, norm_D, norm_D[~axes_D].mean())


def share_kept(variance_D: Tensor, units: int) -> float:
    """Share of the stream's variance in its `units` largest components."""
    ordered = variance_D.sort(descending=True).values
    return float(ordered[:units].sum() / ordered.sum())
