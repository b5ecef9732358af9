"""Sums over calibration batches: a score, its standard error over batches, and the same on each domain's text.

With Q_b a batch's sum of its sequences' values, B batches and n sequences in all:
    mean: score = sum_b Q_b / n,        error = std(Q_b) sqrt(B) / n
    root: score = sqrt(sum_b Q_b),      error = std(Q_b) sqrt(B) / (2 score), by the delta method
std with B - 1 in the denominator. All in fp64. Read next: `calibrate.py`.
"""

import torch
from torch import Tensor


class Tally:
    """Of one granularity: K domains, units of any shape."""

    def __init__(self, domains: int, root: bool) -> None:
        self.root, self.domains = root, domains
        self.batches = 0
        self.count_K = torch.zeros(domains, dtype=torch.int64)
        self._sum: Tensor | None = None
        self._mean: Tensor | None = None
        self._spread: Tensor | None = None

    def add(self, domain_N: Tensor, value: Tensor) -> None:
        """A batch: its N sequences' domains, int64, and values [N, *units]."""
        value, domain_N = value.double(), domain_N.to(value.device)
        if self._sum is None:
            self._sum = value.new_zeros(self.domains, *value.shape[1:])
            self._mean, self._spread = torch.zeros_like(self._sum[0]), torch.zeros_like(self._sum[0])
        assert self._mean is not None and self._spread is not None
        self._sum.index_add_(0, domain_N, value)
        self.count_K += torch.bincount(domain_N.cpu(), minlength=self.domains)
        self.batches += 1
        total = value.sum(0)  # Welford's update of mean and sum of squared deviations
        step = total - self._mean
        self._mean += step / self.batches
        self._spread += step * (total - self._mean)

    def score(self) -> tuple[Tensor, Tensor]:
        """Score and standard error of each unit, fp64; at least two batches."""
        assert self._sum is not None and self._spread is not None
        total = self._sum.sum(0)
        deviation = (self._spread / (self.batches - 1) * self.batches).sqrt()
        if not self.root:
            count = int(self.count_K.sum())
            return total / count, deviation / count
        score = total.sqrt()
        return score, torch.where(score > 0, deviation / (2 * score), 0.0)

    def domain_score(self, domain: int) -> Tensor:
        """The score on one domain's sequences alone, of which there is at least one; fp64."""
        assert self._sum is not None
        return self._sum[domain].sqrt() if self.root else self._sum[domain] / int(self.count_K[domain])
