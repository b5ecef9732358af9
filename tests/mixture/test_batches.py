"""Reading ahead: the batches are those of the stream, whatever was read before they were asked for."""

from contextlib import closing

import numpy as np
import pytest
import torch

from megashear.errors import TrainingError
from megashear.mixture.blend import BlendedStream, sources
from megashear.mixture.loader import Batches, Loader

LENGTH, GLOBAL = 16, 6
ROWS = np.array([1, 4, 5])


def batches(dataset, ahead: int, exhausted: str = "repeat") -> Batches:
    stream = BlendedStream(sources(dataset, LENGTH), 3, [0.5, 0.3, 0.2], exhausted)
    return Batches(Loader(dataset, stream, LENGTH), ROWS, GLOBAL, ahead)


def walk(dataset, ahead: int) -> tuple[list, dict]:
    """Plans and tokens of 12 batches, with the weights changed after the fifth, and the stream's state at the end."""
    with closing(batches(dataset, ahead)) as made:
        found = []
        for number in range(12):
            found.append(made.next())
            if number == 4:
                made.loader.stream.set_weights([0.1, 0.1, 0.8])
        return found, made.loader.stream.state_dict()


@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_reading_ahead_changes_neither_order_nor_state(dataset, ahead: int) -> None:
    (expected, state), (found, state_ahead) = walk(dataset, 0), walk(dataset, ahead)
    assert state == state_ahead
    for (plan, tokens), (plan_ahead, tokens_ahead) in zip(expected, found, strict=True):
        assert plan.same(plan_ahead) and torch.equal(tokens, tokens_ahead)


def test_the_tokens_are_those_of_the_plan(dataset) -> None:
    with closing(batches(dataset, 2)) as made:
        for _ in range(4):
            plan, tokens = made.next()
            assert torch.equal(tokens, made.loader.read(plan, ROWS)[0])


def test_the_end_of_the_data_is_told_when_it_is_reached(dataset) -> None:
    with closing(batches(dataset, 0, "stop")) as plain, closing(batches(dataset, 4, "stop")) as ahead:
        counts = []
        for made in (plain, ahead):
            count = 0
            with pytest.raises(TrainingError, match="has run out of data"):
                while True:
                    made.next()
                    count += 1
            counts.append(count)
    assert counts[0] == counts[1] > 0
