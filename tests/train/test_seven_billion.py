"""A layer of LLaMA2-7B's shape takes one real pruning step on the CPU; 7B -> 2.7B passes in shapes alone."""

import math

import pytest
import torch

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PRESETS
from megashear.config.schema import ParallelConfig
from megashear.config.shape_legality import shape_problems
from megashear.config.training_schema import BatchConfig, OptimizerConfig, PruneConfig
from megashear.engine.layout import distributed
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.masks.mask_optimizer import build_mask_optimizer
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch
from megashear.model.weight_io import RandomWeights, load_weights
from megashear.train.step import Stepper


def test_7b_to_2_7b_is_legal_in_shapes_alone():
    for tensor, pipeline in [(1, 1), (2, 2), (4, 4)]:
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=tensor > 1)
        assert shape_problems(PRESETS["llama2-7b"], PRESETS["sheared-2.7b"], parallel, 16) == []


def test_7b_model_builds_on_meta_with_published_parameter_count(monkeypatch):
    shape, parallel = PRESETS["llama2-7b"], ParallelConfig()
    with distributed(parallel) as layout, torch.device("meta"):
        config = transformer_config(shape, parallel, torch.bfloat16)
        meta = Llama(shape, config, layout, range(shape.num_layers), True, True)
    # Norms name their device; every product's weight is on meta, so nothing of the 13 GB is allocated.
    assert sum(p.numel() for p in meta.parameters()) == shape.parameters() == 6_738_415_616
    assert all(p.is_meta for p in meta.parameters() if p.dim() == 2)


@pytest.mark.slow
def test_one_7b_layer_takes_a_pruning_step():
    full, cut = PRESETS["llama2-7b"], PRESETS["sheared-2.7b"]
    shape = ModelShape(full.hidden_size, 1, full.num_heads, 32, full.head_dim, full.intermediate_size, 512)
    target = ModelShape(cut.hidden_size, 1, cut.num_heads, 20, cut.head_dim, cut.intermediate_size, 512)
    parallel = ParallelConfig()
    with distributed(parallel) as layout:
        module = Llama(shape, transformer_config(shape, parallel, torch.float32), layout, range(1), True, True)
        load_weights(module, RandomWeights(shape, seed=0))
        weights = WeightOptimizer([module], OptimizerConfig(), torch.float32, distributed=True)
        masks = build_mask_optimizer(
            shape, target, PruneConfig(batch=BatchConfig(steps=10), log_alpha_init=1.0), seed=0
        )
        before = {name: value.detach().clone() for name, value in masks.masks.log_alpha.items()}
        down = module.layers["0"].mlp.down.weight.detach().clone()
        tokens = torch.randint(0, 512, (1, 33), generator=torch.Generator().manual_seed(0))
        stepper = Stepper(layout, weights, masks, 0, 1, clip_norm=1.0, clip_jointly=True)
        result = stepper.run([MicroBatch(tokens[:, :-1], tokens[:, 1:], 0)], 1, 1.0, 1e-3)
        assert not result.skipped and result.loss == pytest.approx(math.log(512), rel=0.1)
        assert not torch.equal(module.layers["0"].mlp.down.weight, down)
        assert all(not torch.equal(masks.masks.log_alpha[name], before[name]) for name in before)
