"""Compute scores of a loaded model on calibration text, with standard errors and scores by domain.

With Q_b the sum of a batch's sequences, B batches and n sequences in all:
    mean: score = sum_b Q_b / n,        error = std(Q_b) sqrt(B) / n
    root: score = sqrt(sum_b Q_b),      error = std(Q_b) sqrt(B) / (2 score), by the delta method
std with B - 1 in the denominator, all in fp64.

Text is drawn by the mixture's weights, in a separate order determined by the seed, so the training stream is not
affected. Ranks' parts are summed before squares and absolute values are taken, so scores do not depend on the layout.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megashear.dataset.dataset_folder import Dataset
from megashear.engine.collectives import sum_over_world
from megashear.engine.layout import Layout
from megashear.importance.criteria import REGISTRY
from megashear.masks.unit_scores import Scores
from megashear.mixture.blend import BatchPlan, BlendedStream, sources
from megashear.mixture.loader import Loader
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches


class ScoreSums:
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


STREAM = 0x63616C69
"""Added to the seed: calibration has an order of its own."""


def calibration_loader(
    dataset: Dataset, weights: Mapping[str, float], length: int, seed: int, separate_documents: bool
) -> Loader:
    """Reads calibration text of sequences of `length` tokens, blended by domain weights."""
    stream = BlendedStream(sources(dataset, length), seed + STREAM, weights)
    return Loader(dataset, stream, length, separate_documents)


def calibrate(
    chunks: Sequence[Llama],
    layout: Layout,
    loader: Loader,
    batches: int,
    global_batch: int,
    criteria: Mapping[str, str],
    each: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Scores by granularity, equal on every rank (all of them take part).

    chunks: of the model, without gradient buffers; criteria: granularity -> criterion, none of them `magnitude`.
    global_batch: sequences of a batch, divisible among data-parallel ranks; each: called after every batch.
    """
    names = loader.stream.names
    tallies = {name: ScoreSums(len(names), REGISTRY[criterion].root) for name, criterion in criteria.items()}
    rows = local_rows(global_batch, layout, 1)
    for number in range(batches):
        plan = loader.stream.next_batch(global_batch)
        samples, _ = loader.read(plan, rows.numpy())
        own = micro_batches(samples, layout, 1, layout.device, loader.separator)
        for criterion in dict.fromkeys(criteria.values()):
            wanted = [name for name, one in criteria.items() if one == criterion]
            _measure(chunks, layout, criterion, own, global_batch, {name: tallies[name] for name in wanted}, plan)
        each(number + 1)
    return _scores(tallies, names, criteria)


def _measure(
    chunks: Sequence[Llama],
    layout: Layout,
    criterion: str,
    own: list[MicroBatch],
    global_batch: int,
    tallies: Mapping[str, ScoreSums],
    plan: BatchPlan,
) -> None:
    """Add one batch's values of one criterion to the tallies."""
    measure = REGISTRY[criterion].measure
    assert measure is not None
    found = measure(chunks, own, chunks[0].shape, layout)
    at = torch.tensor([batch.index for batch in own], device=layout.device)
    for name, tally in tallies.items():
        part = found.pop(name)
        whole = part.new_zeros(global_batch, *part.shape[1:])
        whole[at] = part
        tally.add(torch.from_numpy(plan.domain_B), REGISTRY[criterion].value(sum_over_world(whole)))


def _scores(tallies: Mapping[str, ScoreSums], names: Sequence[str], criteria: Mapping[str, str]) -> Scores:
    pairs = {name: tally.score() for name, tally in tallies.items()}
    count_K = next(iter(tallies.values())).count_K
    drawn = [number for number in range(len(names)) if count_K[number]]
    domains = {
        names[number]: {name: tally.domain_score(number).float().cpu() for name, tally in tallies.items()}
        for number in drawn
    }
    return Scores(
        units={name: score.float().cpu() for name, (score, _) in pairs.items()},
        errors={name: error.float().cpu() for name, (_, error) in pairs.items()},
        criteria=dict(criteria),
        domains=domains,
        samples=dict(zip(names, count_K.tolist(), strict=True)),
    )
