"""Hard concrete masks (Louizos et al. 2018) as Sheared LLaMA uses them.

The functions give the distribution's properties and the masks without noise. `HardConcreteMasks` holds log-alpha and
samples masks; a sample is a function of log-alpha and (seed, step, micro-batch), so it is the same in every layout.
Shapes: R rows, each with its own sparsity constraint (layers, or one for the model), N units in a row.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.config.resolve import in_principal_basis
from megashear.config.training_schema import PruneConfig
from megashear.masks.mask_specs import MaskSpec, mask_specs
from megashear.masks.mask_values import Masks, assemble
from megashear.ops.reference import BETA, GAMMA, ZETA

EPS = 1e-6
KAPPA = BETA * math.log(-GAMMA / ZETA)
SOFT_SLOPE = 0.8 / BETA
"""Slope of the deterministic mask: the published evaluation mask is sigmoid(0.8 * log_alpha / beta)."""
INIT_STD = 0.01
FROZEN_LOG_ALPHA = 16.0
"""|log-alpha| of a frozen unit: every sample of it is exactly 1 or exactly 0, whatever the noise."""


def probability_zero(log_alpha: Tensor) -> Tensor:
    """Probability that a sample is exactly 0: sigmoid(kappa - log_alpha), clamped to [1e-6, 1 - 1e-6].

    Source: Louizos et al., equation 12. Differentiable.

    Args:
        log_alpha: Any shape, floating point.

    Returns:
        Probabilities of the same shape and dtype.
    """
    return torch.sigmoid(KAPPA - log_alpha).clamp(EPS, 1.0 - EPS)


def descending_ranks(value_RN: Tensor) -> Tensor:
    """Rank of each unit in its row, int64 [R, N], 0 for the largest; ties go to the lower index."""
    order_RN = torch.argsort(value_RN, dim=-1, descending=True, stable=True)
    rank_RN = torch.arange(value_RN.shape[-1], device=value_RN.device).expand_as(order_RN)
    return torch.empty_like(order_RN).scatter_(-1, order_RN, rank_RN)


def keep_largest(log_alpha_RN: Tensor, kept: int | Tensor) -> Tensor:
    """Select the `kept` largest units of each row; ties go to the lower index.

    Args:
        log_alpha_RN: Values to compare, [R, N].
        kept: One number for all rows, or an integer tensor [R].

    Returns:
        True at the selected units, bool [R, N].
    """
    return descending_ranks(log_alpha_RN) < (kept.unsqueeze(-1) if isinstance(kept, Tensor) else kept)


def expected_zeros(log_alpha_RN: Tensor) -> Tensor:
    """Expected number of zeros of each row: round(n - sum(1 - P0)), halves to even. Returns int64 [R]."""
    units = log_alpha_RN.shape[-1]
    nonzero_R = (1.0 - probability_zero(log_alpha_RN.detach().double())).sum(dim=-1)
    return torch.round(units - nonzero_R).long()


@torch.no_grad()
def deterministic(log_alpha_RN: Tensor, zeros_per_row: int | Tensor) -> Tensor:
    """Mask without noise: sigmoid(1.2 log_alpha), with the smallest units of each row exactly 0.

    A kept unit is never exactly 0, whatever its log_alpha, because the masked norm counts nonzero units.

    Args:
        log_alpha_RN: [R, N].
        zeros_per_row: n - n' for a target of n' units, or `expected_zeros` ([R]).

    Returns:
        Mask values [R, N] in the input's dtype.
    """
    kept_RN = keep_largest(log_alpha_RN, log_alpha_RN.shape[-1] - zeros_per_row)
    soft_RN = torch.sigmoid(SOFT_SLOPE * log_alpha_RN).clamp(min=torch.finfo(log_alpha_RN.dtype).tiny)
    return torch.where(kept_RN, soft_RN, torch.zeros_like(soft_RN))


@torch.no_grad()
def clamp(log_alpha: Tensor, limit: float) -> Tensor:
    """Clamp log_alpha to [-limit, limit] in place and return it."""
    return log_alpha.clamp_(-limit, limit)


class HardConcreteMasks(nn.Module):
    """Parameters of the learned masks, replicated on every rank.

    Attributes:
        log_alpha: Granularity -> parameter of its spec's shape.
        specs: The learned granularities, in their fixed order.
        principal: Whether hidden units are principal directions, so that norms need a gain.
    """

    def __init__(
        self,
        source: ModelShape,
        target: ModelShape,
        config: PruneConfig,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw log-alpha ~ N(config.log_alpha_init, 0.01) by seed and granularity.

        Raises:
            ConfigError: config.granularities do not fit the shapes.
        """
        super().__init__()
        self.source, self.config = source, config
        self.specs = mask_specs(source, target, config.granularities)
        self.principal = in_principal_basis(config, source, target)
        parameters = nn.ParameterDict()
        for spec in self.specs:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + spec.index) % 2**63)
            start = config.log_alpha_init + INIT_STD * torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            parameters[spec.name] = nn.Parameter(start.to(device=device, dtype=dtype))
        self.log_alpha = cast("Mapping[str, nn.Parameter]", parameters)

    def rows(self, spec: MaskSpec) -> Tensor:
        """View of a granularity's log-alpha as rows, [R, N]."""
        return self.log_alpha[spec.name].view(spec.rows, spec.units)

    def sample(self, seed: int, step: int, micro_batch: int) -> Masks:
        """Sample the masks of one micro-batch; gradients reach log-alpha.

        Args:
            seed: The run's seed.
            step: Step of the phase, from 0.
            micro_batch: Index within the global batch.

        Returns:
            Masks with an autograd graph of their own, which serves one backward pass.
        """
        return assemble(self._sample_values(seed, step, micro_batch), self.source, self.principal)

    def _sample_values(self, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
        return {
            spec.name: ops.sample_hard_concrete(self.log_alpha[spec.name], seed, step, micro_batch, spec.index)
            for spec in self.specs
        }

    @torch.no_grad()
    def single_granularity_masks(self, seed: int, step: int, micro_batch: int) -> dict[str, Masks]:
        """The masks of `sample` with one learned granularity at a time, by its name; without gradients."""
        values = self._sample_values(seed, step, micro_batch)
        return {name: assemble({name: value}, self.source, self.principal) for name, value in values.items()}

    @torch.no_grad()
    def deterministic(self, mode: str = "target") -> Masks:
        """Masks without noise.

        Args:
            mode: `target` drops as many units as the target shape, `expected` as many as log-alpha expects now.
        """
        if mode not in ("target", "expected"):
            raise ValueError(f"mode must be target or expected, got {mode!r}")
        values = {}
        for spec in self.specs:
            rows = self.rows(spec)
            zeros = spec.zeros_per_row if mode == "target" else expected_zeros(rows)
            values[spec.name] = deterministic(rows, zeros).view(spec.shape)
        return assemble(values, self.source, self.principal)

    @torch.no_grad()
    def spread_by_scores(self, scores: Mapping[str, Tensor], low: float, high: float) -> None:
        """Set log-alpha by the rank of each unit's score in its row, at equal distances from `high` down to `low`.

        Only ranks are used, since the scale of a score means something else for each criterion.

        Args:
            scores: Granularity -> score, in its log-alpha's shape; higher is better, ties go to the lower index.
                Granularities without a score keep their log-alpha.
            low: Log-alpha of the worst unit of a row.
            high: Log-alpha of the best unit of a row.
        """
        for spec in self.specs:
            if spec.name in scores:
                rows = scores[spec.name].reshape(spec.rows, spec.units).to(self.log_alpha[spec.name].device)
                height = high - (high - low) * descending_ranks(rows).double() / max(1, spec.units - 1)
                self.log_alpha[spec.name].copy_(height.view(spec.shape))

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the masks at the target's shape: the largest log-alpha of each row give 1, all others 0."""
        for spec in self.specs:
            rows = self.rows(spec)
            rows.copy_((keep_largest(rows, spec.target_units).to(rows.dtype) * 2 - 1) * FROZEN_LOG_ALPHA)
