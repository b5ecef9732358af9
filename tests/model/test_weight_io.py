"""Weights come in and go out bit for bit; random ones are a function of seed and name. Layouts: `parallel/`."""

from dataclasses import replace

import pytest
import torch

from helpers.models import GROUPED, MULTI_HEAD, Drawn, build_model
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.engine.layout import Layout
from megashear.hf.tensor_names import tensor_shapes
from megashear.model.weight_io import RandomWeights, gather_tensors

SHAPES = [
    MULTI_HEAD,
    GROUPED,
    replace(GROUPED, num_query_groups=1, tie_word_embeddings=False),
    ModelShape(4, 1, 1, 1, 2, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_loaded_is_gathered_bit_for_bit(layout: Layout, shape: ModelShape) -> None:
    source = Drawn(shape)
    _, (module,) = build_model(shape, ParallelConfig(), source)
    gathered = dict(gather_tensors(module))
    assert gathered.keys() == tensor_shapes(shape).keys()
    for name, tensor in gathered.items():
        assert torch.equal(tensor, source.read(name)), name


def test_weights_take_the_parameters_dtype(layout: Layout) -> None:
    source = Drawn(GROUPED)
    _, (module,) = build_model(GROUPED, ParallelConfig(), source, torch.bfloat16)
    for name, tensor in gather_tensors(module):
        assert torch.equal(tensor, source.read(name).bfloat16()), name


def test_random_weights_are_a_function_of_seed_and_name() -> None:
    one, again, other = RandomWeights(GROUPED, 1), RandomWeights(GROUPED, 1), RandomWeights(GROUPED, 2)
    name, down = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"
    whole = one.read_slice(name, 0, 0, 72)
    assert torch.equal(again.read_slice(name, 0, 5, 9), whole[5:9])
    assert torch.equal(again.read_slice(name, 1, 5, 9), whole[:, 5:9])
    assert not torch.equal(other.read_slice(name, 0, 0, 72), whole)
    assert not torch.equal(one.read_slice(name.replace("1", "0"), 0, 0, 72), whole)
    assert float(whole.std()) == pytest.approx(0.02, rel=0.05)
    assert float(one.read_slice(down, 0, 0, 48).std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert torch.equal(one.read_slice("model.norm.weight", 0, 3, 7), torch.ones(4))
