import json

import numpy as np
import pytest

from megashear.dataset.dataset_folder import Dataset
from megashear.errors import CheckpointError, ConfigError, DataError, TrainingError
from megashear.mixture.blend import BlendedStream, DomainSource, sources

LENGTH = 16
WEIGHTS = {"web": 0.6, "book": 0.3, "code": 0.1}


def three(samples=(500, 200, 60)) -> list[DomainSource]:
    return [DomainSource(n, s * LENGTH + 1, LENGTH) for n, s in zip(WEIGHTS, samples, strict=True)]


def stream(samples=(500, 200, 60), weights=WEIGHTS, seed=7, exhausted="repeat") -> BlendedStream:
    return BlendedStream(three(samples), seed, weights, exhausted)


def taken(plans) -> list[tuple[int, int]]:
    return [(int(d), int(s)) for plan in plans for d, s in zip(plan.domain_B, plan.sample_B, strict=True)]


def test_an_epoch_takes_every_sample_once():
    plans = [stream_.next_batch(38) for stream_ in [stream(weights=[500, 200, 60])] for _ in range(20)]
    assert len(set(taken(plans))) == 760


def test_the_realised_mix_follows_changing_weights():
    random, blended = np.random.default_rng(0), stream()
    share_K, got_K = np.zeros(3), np.zeros(3)
    for step in range(400):
        if step % 20 == 0:
            blended.set_weights(random.dirichlet(np.full(3, 2.0)))
        plan = blended.next_batch(24)
        share_K += blended.weights * 24
        got_K += np.bincount(plan.domain_B, minlength=3)
        assert np.abs(share_K - got_K).max() < 1
    assert blended.cursor_K.tolist() == got_K.tolist()


def test_domains_are_mixed_within_a_batch():
    blended = stream(samples=(5000, 5000, 5000), weights=[1, 1, 1])
    first_half = sum(np.bincount(blended.next_batch(30).domain_B[:15], minlength=3) for _ in range(200))
    assert np.abs(first_half - 1000).max() < 100
    assert blended.next_batch(30).domain_B.tolist() != blended.next_batch(30).domain_B.tolist()


def test_the_stream_is_a_function_of_seed_and_weights():
    assert taken([stream().next_batch(32)]) == taken([stream().next_batch(32)])
    assert taken([stream().next_batch(32)]) != taken([stream(seed=8).next_batch(32)])


@pytest.mark.parametrize("exhausted, samples", [("repeat", (50, 20, 6)), ("renormalise", (300, 90, 30))])
def test_resumed_anywhere_the_stream_goes_on(exhausted, samples):
    """Saved as JSON after every batch and loaded into a new stream: the rest is equal to the bit."""
    random = np.random.default_rng(1)
    history = [random.dirichlet(np.ones(3)) for _ in range(12)]
    blended, rest, states = stream(samples, exhausted=exhausted), [], []
    for weight_K in history:
        blended.set_weights(weight_K)
        states.append(json.dumps(blended.state_dict()))
        rest.append(taken([blended.next_batch(30)]))
    for start, state in enumerate(states):
        again = stream(samples, exhausted=exhausted, weights=[1, 1, 1])
        again.load_state_dict(json.loads(state))
        for step in range(start, len(history)):
            assert again.weights.tolist() == history[step].tolist() or step > start
            again.set_weights(history[step])
            assert taken([again.next_batch(30)]) == rest[step]
        assert again.state_dict() == blended.state_dict()


def test_the_state_does_not_grow():
    blended = BlendedStream([DomainSource(f"a longish name {i}", 10**12, 4096) for i in range(40)], 1, [1] * 40)
    small = len(json.dumps(blended.state_dict()))
    for _ in range(50):
        blended.next_batch(1024)
    blended.cursor_K += 10**9
    assert small <= len(json.dumps(blended.state_dict())) < 4096


@pytest.mark.parametrize("other", [{"seed": 8}, {"samples": (500, 200, 61)}])
def test_a_state_of_another_stream_is_refused(other):
    with pytest.raises(CheckpointError, match="resume with"):
        stream(**other).load_state_dict(stream().state_dict())


def test_swapped_domains_are_refused_by_name():
    swapped = BlendedStream(three()[::-1], 7, [1, 1, 1])
    with pytest.raises(CheckpointError, match="other domains"):
        swapped.load_state_dict(stream().state_dict())


def test_repeat_begins_another_epoch():
    blended = stream(samples=(500, 200, 6))
    code = [s for d, s in taken([blended.next_batch(60) for _ in range(3)]) if d == 2]
    assert len(code) == 18 and sorted(code) == sorted(list(range(6)) * 3)
    assert blended.epochs()["code"] == 3.0
    assert blended.tokens()["code"] == 18 * LENGTH


def test_stop_names_the_domain_and_changes_nothing():
    blended = stream(samples=(500, 200, 6), exhausted="stop")
    blended.next_batch(60)
    before = blended.state_dict()
    with pytest.raises(TrainingError, match=r"'code' has run out .* 60 sequences"):
        blended.next_batch(60)
    assert blended.state_dict() == before


def test_renormalise_shares_the_weight_of_a_domain_that_ran_out():
    blended = stream(samples=(400, 200, 6), exhausted="renormalise")
    plans = [blended.next_batch(60) for _ in range(6)]
    rows = taken(plans)
    assert len(set(rows)) == len(rows) and blended.cursor_K[2] == 6
    assert np.bincount(plans[-1].domain_B, minlength=3).tolist() == [40, 20, 0]
    with pytest.raises(TrainingError, match="every domain has run out"):
        for _ in range(10):
            blended.next_batch(60)
    assert (blended.cursor_K <= [400, 200, 6]).all()


def test_a_domain_repeats_up_to_the_limit_and_the_others_share_its_weight():
    blended = BlendedStream(three((400, 200, 6)), 7, WEIGHTS, "repeat", repeat_limit=3)
    plans = [blended.next_batch(60) for _ in range(4)]
    rows = [row for row in taken(plans) if row[0] == 2]
    assert len(rows) == 18 and all(rows.count((2, sample)) == 3 for sample in range(6))
    assert blended.run_out() == ["code"] and blended.epochs()["code"] == 3
    assert np.bincount(plans[-1].domain_B, minlength=3).tolist() == [40, 20, 0]
    with pytest.raises(TrainingError, match=r"every domain has run out .* without data.repeat_limit"):
        for _ in range(40):
            blended.next_batch(60)


def test_renormalise_within_one_batch():
    """Two of three domains run out in the very batch: the third fills it, and no sample comes twice."""
    blended = stream(samples=(300, 4, 3), weights=[0.2, 0.4, 0.4], exhausted="renormalise")
    plan = blended.next_batch(50)
    assert np.bincount(plan.domain_B, minlength=3).tolist() == [43, 4, 3]
    assert len(set(taken([plan]))) == 50


@pytest.mark.parametrize(
    "weights", [{"web": 1.0}, {**WEIGHTS, "news": 0.1}, [1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]]
)
def test_weights_that_cannot_be(weights):
    with pytest.raises(ConfigError):
        stream(weights=weights)


def test_sources_of_a_dataset(dataset):
    found = sources(dataset, 32)
    assert [(s.name, s.samples) for s in found] == [("web", 156), ("книги 📚", 37), ("code", 10)]
    with pytest.raises(DataError, match="'code' has 333 training tokens"):
        sources(dataset, 333)
    assert isinstance(dataset, Dataset)
