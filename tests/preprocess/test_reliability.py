"""The data path's guarantees at their full number of trials: `pytest -m slow tests/preprocess/test_reliability.py`.

Weights that stay a distribution, a realised mix within one sample of the weights, one stream for every layout. Smaller
forms of the first two run with the suite in `test_mixture.py` and `test_blend.py`.
"""

import itertools
from contextlib import closing

import numpy as np
import pytest
import torch

from megashear.config.schema import MixtureConfig
from megashear.engine.layout import Layout
from megashear.mixture.blend import BlendedStream, DomainSource, sources
from megashear.mixture.domain_weights import Mixture
from megashear.mixture.loader import Batches, Loader
from megashear.model.micro_batch import local_rows

LENGTH = 16
LAYOUTS = [sizes for sizes in itertools.product(range(1, 9), repeat=3) if np.prod(sizes) <= 8 and 24 % sizes[2] == 0]


@pytest.mark.slow
def test_weights_stay_a_distribution_in_100_000_cases() -> None:
    """Rules, rails, smoothing, numbers of domains and losses drawn at random, a tenth of the losses absurd."""
    random = np.random.default_rng(5)
    absurd = [0.0, 1e4, -1e4, np.inf, -np.inf, np.nan, 1e308, None]
    cases = 0
    while cases < 100_000:
        count = int(random.integers(1, 12))
        names = [f"d{number}" for number in range(count)]
        limits = {
            "floor": random.uniform(0, 1 / count),
            "cap": random.uniform(1 / count, 1),
            "max_change": random.random(),
        }
        limits |= {"smoothing": random.uniform(0, 0.9), "eta": random.exponential(2)}
        some = {name: float(value) for name, value in limits.items() if random.random() < 0.5}
        config = MixtureConfig(rule=str(random.choice(["paper", "reference", "ado"])), **some)
        mixture = Mixture(config, dict.fromkeys(names, 1), dict.fromkeys(names, 2.0), steps=100)
        for step in range(1, 11):
            losses = {
                name: absurd[random.integers(len(absurd))] if random.random() < 0.1 else float(random.uniform(0, 12))
                for name in names
            }
            mixture.update(losses, step)
            weight_K = mixture.weight_K
            assert np.isfinite(weight_K).all() and weight_K.min() > 0, (config, losses)
            assert abs(weight_K.sum() - 1) < 1e-12, (config, losses)
            cases += 1


@pytest.mark.slow
def test_the_realised_mix_over_200_histories_and_a_million_samples() -> None:
    """At every batch, the samples taken of each domain are within one of the weights' cumulative share."""
    random = np.random.default_rng(6)
    taken = 0
    for history in range(200):
        count = int(random.integers(2, 9))
        domains = [DomainSource(f"d{number}", 10_000 * 4096 + 1, 4096) for number in range(count)]
        weight_K = random.dirichlet(np.full(count, 0.5))
        stream = BlendedStream(domains, history, weight_K)
        share_K = np.zeros(count)
        for _ in range(40):
            batch = int(random.integers(1, 300))
            plan = stream.next_batch(batch)
            share_K += batch * stream.weights
            taken += len(plan)
            assert np.abs(stream.cursor_K - share_K).max() <= 1 + 1e-6
            if random.random() < 0.5:
                stream.set_weights(random.dirichlet(np.full(count, 0.5)))
    assert taken > 1_000_000


def layout(sizes: tuple[int, int, int], rank: int) -> Layout:
    """The layout of one data-parallel rank of (TP, PP, DP)."""
    tensor, pipeline, data = sizes
    world = tensor * pipeline * data
    return Layout(tensor, 0, pipeline, 0, 1, data, rank, False, world, rank, torch.device("cpu"))


def global_batches(dataset, sizes: tuple[int, int, int], state: dict | None, count: int) -> tuple[list, dict]:
    """The next global batches of 24 sequences as (domain, sample, tokens) rows, put together from all ranks' parts."""
    found: list[dict[int, tuple]] = [{} for _ in range(count)]
    for rank in range(sizes[2]):
        stream = BlendedStream(sources(dataset, LENGTH), 3, [0.5, 0.3, 0.2])
        if state is not None:
            stream.load_state_dict(state)
        rows = local_rows(24, layout(sizes, rank), 1).numpy()
        with closing(Batches(Loader(dataset, stream, LENGTH), rows, 24, ahead=2)) as batches:
            for step in range(count):
                plan, tokens = batches.next()
                for place, row in enumerate(rows):
                    assert int(row) not in found[step]
                    found[step][int(row)] = (plan.domain_B[row], plan.sample_B[row], tokens[place].tolist())
                if step == 1:
                    stream.set_weights([0.2, 0.2, 0.6])
        end = stream.state_dict()
    return [[rows[row] for row in range(24)] for rows in found], end


def test_the_stream_is_the_same_for_every_layout_and_after_a_change_of_it(dataset) -> None:
    """Every (TP, PP, DP) with a product up to 8 that divides the batch; resumed in the middle from each on each."""
    single = (1, 1, 1)
    first, middle = global_batches(dataset, single, None, 3)
    second, end = global_batches(dataset, single, middle, 3)
    states = []
    for sizes in LAYOUTS:
        begun, state = global_batches(dataset, sizes, None, 3)
        assert begun == first and state == middle, sizes
        states.append(state)
    for state, sizes in zip(states[::-1], LAYOUTS, strict=True):
        assert global_batches(dataset, sizes, state, 3) == (second, end), sizes
    assert len(LAYOUTS) > 25
