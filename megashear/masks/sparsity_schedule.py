"""Schedule of the masks over a phase: target sparsities, order of granularities, sharpening, freezing.

Every value is a function of the step, so a resumed run continues exactly; lengths default to shares of the phase.
Target sparsities grow over the sparsity warm-up, masks are sharpened until they are frozen, and the last steps train
the weights on exactly the model that is cut out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megashear.config.presets import PAPER
from megashear.config.resolve import frozen_steps, sparsity_warmup_length
from megashear.config.training_schema import PruneConfig
from megashear.masks.mask_specs import MaskSpec

CROSSINGS = 8.0
"""Times that multipliers can drive a unit from one limit to the other within a phase, at least; with fewer, masks of
phases under some 200 steps end off their targets.
"""


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity schedule of one pruning phase."""

    config: PruneConfig
    specs: tuple[MaskSpec, ...]

    @property
    def projected(self) -> bool:
        """Whether expected sparsities are projected onto their targets, instead of using multipliers."""
        return self.config.constraint == "projected"

    @property
    def warmup_steps(self) -> int:
        """Steps over which target sparsities grow."""
        return sparsity_warmup_length(self.config)

    @property
    def freeze_step(self) -> int:
        """First step with frozen masks; the number of steps if masks are never frozen."""
        return self.config.batch.steps - frozen_steps(self.config)

    def at_half_target(self, step: int, expected: Mapping[str, Any]) -> bool:
        """Whether each granularity has reached half of its target sparsity, by schedule and by its expected sparsity.

        `expected` is on the device; it is not read while the schedule is below half.
        """
        half, asked = {spec.name: spec.target_sparsity / 2 for spec in self.specs}, self.targets(step)
        return all(asked[name] >= half[name] for name in half) and all(expected[name] >= half[name] for name in half)

    def is_frozen(self, step: int) -> bool:
        """Whether the masks of this step are frozen."""
        return self.freeze_step <= step and self.freeze_step < self.config.batch.steps

    def freezes_at(self, step: int) -> bool:
        """Whether this step is the first with frozen masks, after steps with learned ones."""
        return 0 < step == self.freeze_step and self.is_frozen(step)

    def targets(self, step: int) -> dict[str, float]:
        """Scheduled target sparsity by granularity at a step (from 0).

        All grow together over the warm-up, or one after another in the order of `prune.granularity_order`, each over
        an equal part of it. Unlisted granularities come last, in the order of the specs; those that keep all units have
        no part.
        """
        order = self.config.granularity_order
        if order is None:
            return {s.name: scheduled_target(s.target_sparsity, step, self.warmup_steps) for s in self.specs}
        names = [s.name for s in self.specs if s.zeros_per_row]
        queue = [name for name in order if name in names]
        queue += [name for name in names if name not in queue]
        window = self.warmup_steps / len(queue)
        grown = {name: min(1.0, max(0.0, step / window - place) if window else 1.0) for place, name in enumerate(queue)}
        return {s.name: s.target_sparsity * grown.get(s.name, 0.0) for s in self.specs}

    def sharpening_factor(self) -> float:
        """Factor on log-alpha after every step until masks are frozen; its product is `prune.sharpening`."""
        factor: float = self.config.sharpening ** (1.0 / max(1, self.freeze_step))
        return factor

    def rates(self) -> tuple[float, float]:
        """Learning rates of log-alpha and of the multipliers; see `prune.mask_learning_rate` for the default.

        Adam's steps have the size of the rate, so rate times steps is the distance that log-alpha can travel.
        """
        config, steps = self.config, self.config.batch.steps
        share = min(1.0, steps / PAPER["batch"]["steps"])
        mask, multiplier = config.mask_learning_rate, config.lambda_learning_rate
        if mask is None:
            limit = config.log_alpha_init if config.log_alpha_limit is None else config.log_alpha_limit
            crossing = 0.0 if self.projected else CROSSINGS * 2.0 * abs(limit) / steps
            mask = max(share, min(1.0, crossing))
        return mask, 1.0 / share if multiplier is None else multiplier


def scheduled_target(target: float, step: int, warmup_steps: int) -> float:
    """Target sparsity at a step (from 0): grows linearly and stays at `target` from `warmup_steps` on."""
    return target if step >= warmup_steps else target * (step / warmup_steps)
