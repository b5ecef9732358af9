"""Under every layout the ranks hold the same model, and padding of the vocabulary takes no part in it."""

from collections.abc import Callable

import pytest
import torch

from helpers.models import SHAPES, Drawn
from helpers.ranks import Ranks
from megashear.hf.tensor_names import tensor_shapes
from megashear.model.weight_io import RandomWeights

LAYOUTS = [
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 4}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"pipeline": 2}),
]


@pytest.mark.parametrize(
    ("world", "parallel", "shape", "random"),
    [
        (2, {"tensor": 2}, "grouped", False),
        (2, {"pipeline": 2}, "multi-head", True),
        (4, {"tensor": 2, "pipeline": 2}, "multi-head", True),
        (4, {"tensor": 4}, "grouped", False),  # more ranks than groups
        *(pytest.param(*layout, "grouped", False, marks=pytest.mark.slow) for layout in LAYOUTS),
        *(pytest.param(*layout, "multi-head", True, marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
)
def test_ranks_hold_the_whole_model_bit_for_bit(
    ranks: Callable[[int], Ranks], world: int, parallel: dict[str, int], shape: str, random: bool
) -> None:
    found = ranks(world).call("parallel.weights_case:gathered", shape=shape, parallel=parallel, random=random)
    whole = tensor_shapes(SHAPES[shape])
    assert found.keys() == whole.keys()
    drawn, random_weights = Drawn(SHAPES[shape]), RandomWeights(SHAPES[shape], seed=3)
    for name, size in whole.items():
        wanted = random_weights.read_slice(name, 0, 0, size[0]) if random else drawn.read(name)
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize(("vocabulary", "world", "columns"), [(101, 2, 102), (101, 4, 104), (5, 4, 8)])
def test_padding_columns_are_never_predicted(
    ranks: Callable[[int], Ranks], vocabulary: int, world: int, columns: int
) -> None:
    """With 5 tokens on 4 ranks the last rank holds nothing but padding."""
    found = ranks(world).call("parallel.weights_case:padded", vocabulary=vocabulary, tensor=world)
    wanted = ranks(1).call("parallel.weights_case:padded", vocabulary=vocabulary, tensor=1)
    assert found["logits"].shape[-1] == columns
    assert (found["logits"][..., vocabulary:] == torch.finfo(torch.float32).min).all()
    assert torch.allclose(found["logits"][..., :vocabulary], wanted["logits"], atol=1e-5)
    assert torch.allclose(found["losses"], wanted["losses"], rtol=1e-5)
    assert found["losses"].isfinite().all()
    assert found["padding gradients"] == 0.0
