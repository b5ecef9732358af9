"""Progress line of a training phase, with model FLOPs utilisation (MFU).

    prune 1200/3200  loss 2.4310  grad 0.84  lr 7.31e-05  29,504 tok/s  MFU 38.2%  sparsity hidden 35/37% ...  ETA 3:07

The rate is that of this process's steps, smoothed, by wall time: evaluations and checkpoints are included, in the ETA
too. With a teacher, `distillation 0.1234 (+33% FLOPs)` follows the loss, and the MFU includes its forward pass. Peak
FLOP/s are for dense bf16 products with fp32 accumulation; a device that is not in the table has no MFU.
"""

import re
import time
from collections.abc import Callable, Mapping

from megashear.planning.text_table import duration

# (words that all stand in the device's name, FLOP/s); the first row that fits is taken, so variants stand before the
# plain name. Sources: NVIDIA's data sheet of each product; GeForce and RTX: white papers of GA102, AD102, GB202.
PEAK_BF16: tuple[tuple[tuple[str, ...], float], ...] = (
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H800", "PCIe"), 756e12),
    (("H800",), 989e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H20",), 148e12),
    (("B200",), 2250e12),
    (("GB200",), 2500e12),
    (("B300",), 2250e12),
    (("GB300",), 2500e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("A40",), 149.7e12),
    (("A30",), 165e12),
    (("A10",), 125e12),
    (("A6000",), 154.8e12),
    (("3090",), 71e12),
    (("4090",), 165.2e12),
    (("5090",), 209.5e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by the name its driver gives; None where it is unknown or a slice (MIG)."""
    words = {word.casefold() for word in re.split(r"[^0-9A-Za-z]+", device_name)}
    if "mig" in words:
        return None
    for names, flops in PEAK_BF16:
        if all(name.casefold() in words for name in names):
            return flops
    return None


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, device_name: str, devices: int
) -> float | None:
    """Share of the devices' peak that the model's own FLOPs use (PaLM, appendix B; recomputation does not count).

    tokens_per_second: over all devices; flops_per_token: `ModelShape.flops_per_token`. None where the peak is unknown.
    """
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)


HALF_LIFE_STEPS = 50


class Progress:
    """Rate, ETA and progress line of one phase."""

    def __init__(
        self,
        phase: str,
        steps: int,
        flops_per_token: float,
        device_name: str,
        devices: int,
        step: int = 0,
        tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """steps: of the whole phase; step, tokens: done before this process; devices: ranks that share the work."""
        self.phase = phase
        self.steps = steps
        self.flops_per_token = flops_per_token
        self._devices = (device_name, devices)
        self._clock = clock
        self._step, self._tokens, self._time = step, tokens, clock()
        # Sums that decay with the steps; their quotients are the smoothed rates, without a bias at the start.
        self._sum_steps = self._sum_tokens = self._sum_seconds = 0.0

    def advance(self, step: int, tokens: int) -> None:
        """Take note that `step` steps and `tokens` tokens of the phase are done; call it at every line."""
        now = self._clock()
        decay = 0.5 ** ((step - self._step) / HALF_LIFE_STEPS)
        self._sum_steps = self._sum_steps * decay + step - self._step
        self._sum_tokens = self._sum_tokens * decay + tokens - self._tokens
        self._sum_seconds = self._sum_seconds * decay + now - self._time
        self._step, self._tokens, self._time = step, tokens, now

    @property
    def tokens_per_second(self) -> float:
        """Smoothed tokens per second over all devices; 0 before the first step."""
        return self._sum_tokens / self._sum_seconds if self._sum_seconds > 0 else 0.0

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation, 0 to 1; None where the device's peak is unknown."""
        return model_flops_utilisation(self.tokens_per_second, self.flops_per_token, *self._devices)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the phase at the present rate; None before the first step."""
        if not self._sum_steps:
            return None
        return (self.steps - self._step) * self._sum_seconds / self._sum_steps

    def line(
        self,
        loss: float,
        grad_norm: float,
        lr: float,
        expected: Mapping[str, float] | None = None,
        target: Mapping[str, float] | None = None,
        distillation: float | None = None,
        teacher_flops: float | None = None,
    ) -> str:
        """The line for the step of the last `advance`. expected, target: sparsity (0 to 1) by granularity, or None;
        distillation: KL from the teacher, and the teacher's FLOPs as a share of the model's own, or None.
        """
        parts = [
            f"{self.phase} {self._step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {loss:.4f}",
            *([] if distillation is None else [f"distillation {distillation:.4f} (+{teacher_flops or 0:.0%} FLOPs)"]),
            f"grad {grad_norm:.3g}",
            f"lr {lr:.2e}",
            f"{self.tokens_per_second:,.0f} tok/s",
        ]
        if self.utilisation is not None:
            parts.append(f"MFU {self.utilisation:.1%}")
        if expected:
            targets = target or {}
            shown = [
                f"{name} {value * 100:.1f}" + (f"/{targets[name] * 100:.1f}%" if name in targets else "%")
                for name, value in expected.items()
            ]
            parts.append("sparsity " + " ".join(shown))
        left = self.seconds_left
        parts.append(f"ETA {duration(left)}" if left is not None else "ETA -")
        return "  ".join(parts)
