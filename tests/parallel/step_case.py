"""One pruning step per layout under torchrun; rank 0 writes loss, gradients and masks of each case for the test to compare.

Usage: torchrun --nproc-per-node N step_case.py OUTPUT CASE... with CASE = tensor,pipeline,virtual,sequence,groups,dtype
"""

import sys

import torch

from megashear.config.schema import BatchConfig, OptimizerConfig, ParallelConfig, PruneConfig
from megashear.config.shape import ModelShape
from megashear.engine.collectives import gather_objects
from megashear.engine.layout import build_layout, distributed
from megashear.engine.optimizer import WeightOptimizer, unwrap
from megashear.engine.parallel import transformer_config
from megashear.engine.pipeline import build_chunks
from megashear.masks.state import MaskState
from megashear.model.llama import Llama
from megashear.model.load import RandomWeights, load_weights
from megashear.model.save import gather_tensors
from megashear.train.step import Stepper, local_rows, micro_batches

GLOBAL_BATCH, LENGTH, STEP = 4, 16, 3


def shape_of(groups: int) -> ModelShape:
    return ModelShape(32, 5, 8, groups, 8, 48, 101, tie_word_embeddings=groups == 2)


def target_of(groups: int) -> ModelShape:
    return ModelShape(16, 3, 4 if groups == 8 else 2 * groups // 2, groups // 2, 8, 24, 101)


def run_case(case: str) -> dict | None:
    tensor, pipeline, virtual, sequence, groups = map(int, case.split(",")[:5])
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, sequence=bool(sequence))
    layout = build_layout(parallel)
    shape = shape_of(groups)
    config = transformer_config(shape, parallel, torch.float32)
    source = RandomWeights(shape, seed=5)
    modules = build_chunks(
        shape.num_layers, layout, lambda r, first, last, stage: Llama(shape, config, layout, r, first, last, vp_stage=stage)
    )
    for module in modules:
        load_weights(module, source)
    weights = WeightOptimizer(modules, OptimizerConfig(learning_rate=1e-3), torch.float32, distributed=True)
    prune = PruneConfig(log_alpha_init=1.0, batch=BatchConfig(steps=8), sparsity_warmup_steps=4)
    masks = MaskState(shape, target_of(groups), prune, seed=7, device=layout.device)
    with torch.no_grad():
        for number, value in enumerate(masks.log_alpha.values()):
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    stepper = Stepper(layout, weights, masks, 11, 1, clip_norm=1.0, clip_jointly=True)
    samples = torch.randint(0, 101, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batches = micro_batches(samples[local_rows(GLOBAL_BATCH, layout, 1)], layout, 1, layout.device)
    # The gradients are read where the optimizer would take them: reduced, before clipping.
    loss = stepper.forward_backward(batches, STEP)
    mask_gradient = masks.gradients_flat().clone()
    gradients = {}
    for chunk in weights.chunks:
        module = unwrap(chunk)
        if layout.data_size == 1:
            gradients |= {n: t.clone() for n, t in gather_tensors(module, lambda p: p.main_grad)}
    result = stepper.run(batches, STEP, 1.0, 1e-3)
    after = {}
    for chunk in weights.chunks:
        after |= {name: value.clone() for name, value in gather_tensors(unwrap(chunk))}
    everyone = gather_objects((gradients, after))
    merged: tuple[dict, dict] = ({}, {})
    for one in everyone:
        merged[0].update(one[0])
        merged[1].update(one[1])
    return {
        "loss": loss,
        "norm": result.grad_norm,
        "lagrangian": result.lagrangian,
        "mask_gradient": mask_gradient,
        "gradients": merged[0],
        "after": merged[1],
        "log_alpha": {name: value.detach().clone() for name, value in masks.log_alpha.items()},
        "multipliers": {name: value.detach().clone() for name, value in masks.multipliers.items()},
    }


def main() -> None:
    output, cases = sys.argv[1], sys.argv[2:]
    with distributed(ParallelConfig()) as layout:
        results = {case: run_case(case) for case in cases}
        if layout.is_main:
            torch.save(results, output)


if __name__ == "__main__":
    main()
