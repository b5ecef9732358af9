"""State of the masks: log-alpha, Lagrange multipliers and their Adam, replicated on every rank in fp32.

A step's masks are a function of (seed, step, micro-batch) and log-alpha, not of the layout. log-alpha is projected onto
[-limit, limit] in the fp32 master (the published code projects a copy). One step of the training loop:

    state.zero_gradients()
    masks = state.sample(seed, step, micro_batch)      # per micro-batch and model chunk; backward fills the gradients
    all_reduce(state.gradients_flat())                 # in place; or set_gradients_flat(reduced)
    state.add_lagrangian_gradients(step)
    state.scale_gradients(...)                         # if gradients are clipped jointly
    state.step(factor, step)                           # Adam, then the constraint of the next step

Source: Sheared LLaMA (arXiv 2310.06694), section 2.1 and appendix A.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.config.resolve import in_principal_basis
from megashear.config.training_schema import PruneConfig
from megashear.errors import CheckpointError
from megashear.masks.constraint import MIN_SPARSITY, expected_sparsity, lagrangian, project
from megashear.masks.distribution import clamp, deterministic, expected_zeros, keep_largest, places
from megashear.masks.kept_units import describe_undecided
from megashear.masks.mask_specs import MaskSpec, mask_specs
from megashear.masks.mask_values import Masks, assemble
from megashear.masks.sparsity_schedule import SparsitySchedule

INIT_STD = 0.01
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN_LOG_ALPHA = 16.0
"""|log-alpha| of a settled unit: every sample of it, whatever the noise, is exactly 1 or exactly 0."""
MIN_OPEN_LOG_ALPHA = 2.0
"""Log-alpha of the least unit at a warm start under `lagrangian`: it is closed in 3 % of the samples."""


class MaskState:
    """Parameters of the learned masks and what is done with them; see the module's docstring for the order of calls."""

    def __init__(
        self,
        source: ModelShape,
        target: ModelShape,
        config: PruneConfig,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Fresh state: log-alpha ~ N(config.log_alpha_init, 0.01) by seed and granularity, multipliers 0.

        Raises ConfigError where config.granularities do not fit the shapes.
        """
        self.source, self.target, self.config = source, target, config
        self.specs = mask_specs(source, target, config.granularities)
        self.principal = in_principal_basis(config, source, target)
        self.closing = SparsitySchedule(config, tuple(self.specs))
        self.undecided: list[str] = []
        """What was open about the masks when they settled, in sentences."""
        self.log_alpha: dict[str, Tensor] = {}
        self.multipliers: dict[str, Tensor] = {}
        for spec in self.specs:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + spec.index) % 2**63)
            start = config.log_alpha_init + INIT_STD * torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            self.log_alpha[spec.name] = start.to(device=device, dtype=dtype).requires_grad_()
            self.multipliers[spec.name] = torch.zeros(2, device=device, dtype=dtype, requires_grad=True)
        self._constrain(0)
        self._rates = self.closing.rates()
        self._adam = torch.optim.Adam(
            [
                {"params": list(self.log_alpha.values()), "maximize": False},
                {"params": list(self.multipliers.values()), "maximize": True},
            ],
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            fused=True,
        )
        # All gradients are views of one buffer, log-alpha's first: one all-reduce, one norm, one scaling.
        parameters = self.parameters()
        self._gradient = torch.zeros(sum(p.numel() for p in parameters), device=device, dtype=dtype)
        for parameter, part in zip(parameters, self._gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def parameters(self) -> list[Tensor]:
        """Log-alpha of every learned granularity, then the multipliers."""
        return [*self.log_alpha.values(), *self.multipliers.values()]

    @torch.no_grad()
    def warm_start(self, scores: Mapping[str, Tensor]) -> None:
        """Start log-alpha from scores by granularity (of its log-alpha's shape, higher is kept), before the first step.

        Within each row units stand in the order of their scores, at equal distances: what a score's unit is, and how
        its values lie, tells nothing that holds for all criteria. Under `projected` they lie over +-
        `importance.spread`, and the constraint shifts them; under `lagrangian`, which shifts nothing, between OPEN and
        the limit, so that all are open as they are without scores. Of equal scores the lower index comes first, as in
        keep sets. Granularities without a score stay as they are.
        """
        low, high = self._span()
        for spec in self.specs:
            if spec.name in scores:
                rows = scores[spec.name].reshape(spec.rows, spec.units).to(self.log_alpha[spec.name].device)
                height = high - (high - low) * places(rows).double() / max(1, spec.units - 1)
                self.log_alpha[spec.name].copy_(height.view(spec.shape))
        self._constrain(0)

    def _span(self) -> tuple[float, float]:
        """Log-alpha of the least and of the best unit of a row at a warm start."""
        spread, limit = self.config.importance.spread, self.config.log_alpha_limit
        if self.closing.projected:
            return -spread, spread
        high = max(MIN_OPEN_LOG_ALPHA, self.config.log_alpha_init) if limit is None else limit
        return min(MIN_OPEN_LOG_ALPHA, high / 2), high  # scores keep their order under a low limit too

    @torch.no_grad()
    def _constrain(self, step: int) -> None:
        """Put log-alpha where the schedule wants it at a step: within its limit, on its target, or settled."""
        targets = self.closing.targets(step)
        if self.closing.freezes_at(step):
            if self.closing.projected:  # as a step with learned masks would find them
                for spec in self.specs:
                    self._project(spec, targets[spec.name])
            self.undecided = self.describe_undecided()
        for spec in self.specs:
            rows = self._rows(spec)
            if self.closing.settled(step):
                rows.copy_((keep_largest(rows, spec.target_units).to(rows.dtype) * 2 - 1) * FROZEN_LOG_ALPHA)
            elif self.closing.projected:
                self._project(spec, targets[spec.name])
            elif self.config.log_alpha_limit is not None:
                clamp(rows, self.config.log_alpha_limit)

    def _project(self, spec: MaskSpec, sparsity: float) -> None:
        """Shift a granularity's rows onto a sparsity: the least that can be told from 0 but never more than the target;
        where the target keeps every unit all stay open.
        """
        rows = self._rows(spec)
        if spec.zeros_per_row:
            rows.copy_(project(rows, max(sparsity, min(MIN_SPARSITY, spec.target_sparsity))))
        else:
            rows.fill_(FROZEN_LOG_ALPHA)

    def describe_undecided(self) -> list[str]:
        """What is wrong with the masks, were they cut now, in sentences; nothing where all is well."""
        return describe_undecided(self.log_alpha, self.specs, self.config)

    # Masks

    def sample(self, seed: int, step: int, micro_batch: int) -> Masks:
        """Random masks of one micro-batch; gradients reach log-alpha. micro_batch: its index within the global batch.

        Each call builds its own graph: call it once for each backward pass (so once per model chunk).
        """
        return assemble(self._drawn(seed, step, micro_batch), self.source, self.principal)

    def _drawn(self, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
        return {
            spec.name: ops.sample_hard_concrete(self.log_alpha[spec.name], seed, step, micro_batch, spec.index)
            for spec in self.specs
        }

    @torch.no_grad()
    def single_granularity_masks(self, seed: int, step: int, micro_batch: int) -> dict[str, Masks]:
        """The masks of `sample` of one learned granularity at a time, by its name; without gradients."""
        drawn = self._drawn(seed, step, micro_batch)
        return {name: assemble({name: value}, self.source, self.principal) for name, value in drawn.items()}

    @torch.no_grad()
    def deterministic(self, mode: str = "target") -> Masks:
        """Masks without noise, zeros by the target's shape (`target`) or by what is expected now (`expected`)."""
        if mode not in ("target", "expected"):
            raise ValueError(f"mode is target or expected, not {mode!r}")
        values = {}
        for spec in self.specs:
            rows = self._rows(spec)
            zeros = spec.zeros_per_row if mode == "target" else expected_zeros(rows)
            values[spec.name] = deterministic(rows, zeros).view(spec.shape)
        return assemble(values, self.source, self.principal)

    # The constraint

    def lagrangian_loss(self, step: int) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """The Lagrangian (0-d, differentiable) and {"expected": {granularity: 0-d}, "target": {granularity: float}}.

        Under `projected` the constraint holds already and the loss is a plain 0.
        """
        targets = self.closing.targets(step)
        rows = {s.name: self._rows(s) for s in self.specs}
        if self.closing.projected:
            expected = {name: expected_sparsity(row.detach()).mean() for name, row in rows.items()}
            return self._gradient.new_zeros(()), {"expected": expected, "target": targets}
        loss, expected = lagrangian(rows, self.multipliers, targets)
        return loss, {"expected": expected, "target": targets}

    def _rows(self, spec: MaskSpec) -> Tensor:
        """Log-alpha as rows that are constrained apart, [R, N]."""
        return self.log_alpha[spec.name].view(spec.rows, spec.units)

    def add_lagrangian_gradients(self, step: int) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """Adds the Lagrangian's gradients once, after the reduction: they are the same on every rank.

        Returns what `lagrangian_loss` does, the loss detached.
        """
        loss, info = self.lagrangian_loss(step)
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), info

    # Gradients and the optimiser

    def zero_gradients(self) -> None:
        """Sets every gradient to 0; to be called before the first micro-batch of a step."""
        self._gradient.zero_()

    def gradients_flat(self) -> Tensor:
        """Gradients of log-alpha, one flat view for one all-reduce in place (multipliers have none from the data)."""
        return self._gradient[: sum(value.numel() for value in self.log_alpha.values())]

    def set_gradients_flat(self, flat: Tensor) -> None:
        """Takes reduced gradients of log-alpha, in the layout of `gradients_flat`."""
        self.gradients_flat().copy_(flat)

    def grad_norm_squared(self) -> Tensor:
        """Sum of squares of all gradients here, 0-d; counted once in a global norm, since every rank holds the same."""
        return self._gradient.square().sum()

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiplies every gradient, as a joint clip does."""
        self._gradient.mul_(factor)

    @torch.no_grad()
    def step(self, learning_rate_factor: float, step: int) -> None:
        """One Adam step, then the constraint of the step after `step` (from 0).

        log-alpha descends and the multipliers ascend, both rates times the factor of the schedule. Settled masks move
        no more.
        """
        if self.closing.settled(step):
            return
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate_factor
        self._adam.step()
        sharpening_factor = self.closing.sharpening_factor()
        for log_alpha in self.log_alpha.values():
            log_alpha.mul_(sharpening_factor)
        # The linear multiplier goes below 0 while masks are to close, and above it while they are to open.
        for pair in self.multipliers.values():
            for value, cap in zip(pair, (self.config.lambda1_cap, self.config.lambda2_cap), strict=True):
                if cap is not None:
                    value.clamp_(-cap, cap)
        self._constrain(step + 1)

    @torch.no_grad()
    def skip(self, step: int) -> None:
        """In place of `step` where a step is skipped: nothing moves, but masks settle where they are due. What the
        schedule asks for is caught up by the next step's constraint.
        """
        if self.closing.freezes_at(step + 1):
            self._constrain(step + 1)

    # Saving

    def _named(self) -> dict[str, Tensor]:
        named = {f"log_alpha.{name}": value for name, value in self.log_alpha.items()}
        return named | {f"multipliers.{name}": value for name, value in self.multipliers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters, their Adam moments (`NAME.exp_avg`, `NAME.exp_avg_sq`) and `adam_steps` (0-d)."""
        saved: dict[str, Tensor] = {"adam_steps": torch.tensor(0)}
        for name, value in self._named().items():
            saved[name] = value.detach().clone()
            moments = self._adam.state.get(value, {})
            for moment in MOMENTS:
                saved[f"{name}.{moment}"] = moments.get(moment, torch.zeros_like(value)).detach().clone()
            saved["adam_steps"] = torch.tensor(int(moments.get("step", 0)))
        return saved

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Takes up a saved state. Raises CheckpointError where granularities or sizes are another run's."""
        named = self._named()
        wanted = {f"{name}{end}": v.shape for name, v in named.items() for end in ("", *(f".{m}" for m in MOMENTS))}
        wanted["adam_steps"] = torch.Size(())
        found = {name: value.shape for name, value in saved.items()}
        if wanted != found:
            differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise CheckpointError(
                f"mask state: the checkpoint's granularities or sizes are not this run's in {', '.join(differing)}. "
                "Use the source, target and prune.granularities with which it was saved."
            )
        steps = float(saved["adam_steps"])
        for name, value in named.items():
            value.copy_(saved[name])
            moments = {moment: saved[f"{name}.{moment}"].to(value).clone() for moment in MOMENTS}
            self._adam.state[value] = {"step": torch.tensor(steps, device=value.device), **moments}
