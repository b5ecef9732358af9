"""Scores of a loaded model on calibration text.

Key properties: text comes from the domains by the mixture's weights, in an order of its own that the seed determines,
so the training stream neither moves nor repeats it; a sample is one sequence, whose domain is known, so scores depend
neither on the layout nor on micro-batches. Ranks' parts are summed before a value is taken of them, so that squares and
absolute values are those of the whole. Read next: `registry.py`, `tally.py`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from megashear.data.blend import BatchPlan, BlendedStream, sources
from megashear.data.loader import Loader
from megashear.data.manifest import Dataset
from megashear.engine.collectives import sum_over_world
from megashear.engine.layout import Layout
from megashear.importance.registry import REGISTRY
from megashear.importance.tally import Tally
from megashear.masks.scores import Scores
from megashear.model.llama import Llama
from megashear.train.step import MicroBatch, local_rows, micro_batches

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
    tallies = {name: Tally(len(names), REGISTRY[criterion].root) for name, criterion in criteria.items()}
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
    tallies: Mapping[str, Tally],
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


def _scores(tallies: Mapping[str, Tally], names: Sequence[str], criteria: Mapping[str, str]) -> Scores:
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
