"""The memory estimate: parameters add up, pipelines as the engine cuts them, activations as autograd keeps them."""

from dataclasses import replace

import pytest
import torch

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.config.presets import PRESETS
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import PruneConfig
from megashear.engine.layout import distributed, stage_layers
from megashear.engine.parallel import transformer_config
from megashear.masks.hard_concrete_masks import HardConcreteMasks
from megashear.masks.mask_values import Masks
from megashear.model.live_units import WHOLE, LivePlanner
from megashear.model.masking import stage_masks
from megashear.model.transformer_layer import Layer, Stream
from megashear.planning.memory_estimate import (
    Memory,
    Work,
    chunk_layers,
    layer_activations,
    layers_in_flight,
    one_shot_memory,
    rank_parameters,
    stage_memory,
)

TINY = ModelShape(128, 7, 4, 2, 32, 352, 512)
WORK = Work(micro_batch=2, micro_batches=8, sequence_length=64, data_parallel=2, precision="bf16", masked=False)


def test_bytes_of_the_published_source_on_one_rank() -> None:
    shape = PRESETS["llama2-7b"]
    (memory,) = stage_memory(shape, ParallelConfig(distributed_optimizer=False), WORK)
    assert memory.parameters == shape.parameters() == 6_738_415_616
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(n * shape.parameters() for n in (2, 4, 12))
    (sharded,) = stage_memory(shape, ParallelConfig(), WORK)
    assert sharded.optimizer == 6 * shape.parameters()
    assert memory.logits == (2 * 2 + 4) * 2 * 64 * 32000


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_parameters_of_all_stages_add_up(pipeline: int, tied: bool) -> None:
    shape = ModelShape(128, 7, 4, 2, 32, 352, 512, tie_word_embeddings=tied)
    parallel = ParallelConfig(pipeline=pipeline)
    total = sum(rank_parameters(shape, parallel, stage) for stage in range(pipeline))
    copy = 512 * 128 if tied and pipeline > 1 else 0
    assert total == shape.parameters() + copy


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (3, 1), (2, 3), (3, 2)])
def test_layers_are_cut_as_the_engine_cuts_them(pipeline: int, virtual: int) -> None:
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)

    class Stage:
        pipeline_size, virtual_size = pipeline, virtual

        def __init__(self, rank: int) -> None:
            self.pipeline_rank = rank

    for stage in range(pipeline):
        expected = [len(stage_layers(7, Stage(stage), chunk)) for chunk in range(virtual)]  # type: ignore[arg-type]
        assert chunk_layers(7, parallel, stage) == expected


def test_micro_batches_in_flight() -> None:
    shape = ModelShape(128, 8, 4, 2, 32, 352, 512)
    pipeline = ParallelConfig(pipeline=4)
    assert [layers_in_flight(shape, pipeline, WORK, stage) for stage in range(4)] == [8, 6, 4, 2]
    virtual = ParallelConfig(pipeline=4, virtual_pipeline=2)
    # Chunks of one layer; first stage: 2 * 3 + 4 chunk forwards ahead, and the one that runs.
    assert [layers_in_flight(shape, virtual, WORK, stage) for stage in range(4)] == [11, 9, 7, 5]
    few = Work(1, 2, 64, 1, "bf16", False)
    assert [layers_in_flight(shape, pipeline, few, stage) for stage in range(4)] == [4, 4, 4, 2]


def test_recomputation_and_sequence_parallelism_shrink_activations() -> None:
    plain, sequence, again = (
        stage_memory(PRESETS["llama2-7b"], ParallelConfig(tensor=2, **more), WORK)[0].activations
        for more in ({}, {"sequence": True}, {"sequence": True, "recompute": "full"})
    )
    assert plain > sequence > 4 * again


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision: str, masked: bool) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    kept: dict[int, int] = {}
    with distributed(ParallelConfig()) as layout:
        layer = Layer(TINY, transformer_config(TINY, ParallelConfig(), dtype), layout)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        own = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        masks = Masks()
        if masked:
            target = ModelShape(64, 7, 2, 1, 32, 176, 512)
            masks = HardConcreteMasks(TINY, target, PruneConfig(), seed=1).sample(1, 0, 0)
        live = LivePlanner(TINY, layout, range(7))(WHOLE)
        layer_masks = stage_masks(masks, live, TINY, layout, range(7), dtype).layers[0]
        rope = ops.rope_tables(TINY.head_dim, 64, 10000.0, None, layout.device)
        x_SBD, branch_SBD = torch.randn(2, 64, 2, 128, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # The stream as a layer within the stack receives it: the previous branch is not added yet.
            layer(Stream(x_SBD, branch_SBD, layer_masks.branch), rope, layer_masks)
    estimate = layer_activations(TINY, ParallelConfig(), Work(2, 1, 64, 1, precision, masked))
    ratio = sum(kept.values()) / estimate
    if ops.backend("cpu")["swiglu"] == "reference":
        assert 1.2 < ratio < 3.0
    else:
        assert 0.9 < ratio < 1.1


def test_one_shot_takes_what_its_hungriest_part_does() -> None:
    """LLaMA2-7B to 2.7B in bf16 on one rank: two copies and the fit's sums; without a fit the graph of one sequence."""
    source, target = PRESETS["llama2-7b"], PRESETS["sheared-2.7b"]
    work = replace(WORK, masked=True)

    def part(gradients: bool, fits: bool, work: Work = work, **parallel: int) -> Memory:
        return one_shot_memory(source, target, ParallelConfig(**parallel), work, gradients, fits)[-1]

    single = replace(work, micro_batch=1)
    layer, weights = layer_activations(source, ParallelConfig(), single), 2 * source.parameters()
    fitting = part(True, True)
    assert fitting.weights == 2 * weights and fitting.logits == 0
    assert fitting.activations == layer + 20 * 6912 * (6912 + 2560)
    assert fitting.gradients == fitting.optimizer == fitting.teacher == 0
    long = replace(work, micro_batch=1, sequence_length=2048)
    scoring = part(True, False, long)
    (training,) = stage_memory(source, ParallelConfig(), long)
    assert scoring == replace(training, gradients=0, optimizer=0) and scoring.weights == weights
    assert part(False, False, long).activations == scoring.activations // 32, "forward alone keeps one layer"
    evaluating = part(False, False)
    assert (evaluating.weights, evaluating.activations, evaluating.logits) == (weights, 2 * layer, 8 * 2 * 64 * 32000)
    assert part(True, True, pipeline=2).weights < 1.1 * weights, "two copies of half of it"


def test_a_teacher_keeps_states_of_every_micro_batch_on_the_last_stage() -> None:
    taught = replace(WORK, teacher=TINY, chunk=100)
    first, last = stage_memory(TINY, ParallelConfig(pipeline=2), taught)
    sizes = [rank_parameters(TINY, ParallelConfig(pipeline=2), stage) for stage in range(2)]
    assert first.teacher == 2 * sizes[0]
    assert last.teacher == 2 * sizes[1] + 8 * (2 * 2 * 64 * 128) + 100 * 512 * (2 + 20)
    (split,) = stage_memory(TINY, ParallelConfig(tensor=2, sequence=True), taught)
    states = 2 * 2 * 64 * 128
    assert split.teacher == 2 * rank_parameters(TINY, ParallelConfig(tensor=2), 0) + 5 * states + 100 * 256 * 22
