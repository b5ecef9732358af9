"""Whole training steps for `gpu.py`: pruning against plain training (G6), and the utilisation of plain training (G7).

Needs megatron-core; one rank. All contenders of a shape share its weights and take turns.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_clock import Clock
from step import all_living, build_weights, closed, our_step

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PRESETS
from megashear.config.schema import ParallelConfig
from megashear.engine.layout import Layout, distributed
from megashear.model.weight_io import RandomWeights
from megashear.train.progress import peak_flops

LENGTH, SEQUENCES, SEED = 4096, 2, 1
LAYERS = 8
PLAIN = {"7B x 8 layers": ("llama2-7b", 8), "13B x 6 layers": ("llama2-13b", 6), "2.7B": ("sheared-2.7b", 0)}
PLAIN |= {"1.3B": ("sheared-1.3b", 0)}


def shape_of(preset: str, layers: int) -> ModelShape:
    """A preset's shape, with so many layers (0: all)."""
    shape = PRESETS[preset]
    return replace(shape, num_layers=layers) if layers else shape


def steps(small: bool, clock: Clock) -> Iterator[dict[str, Any]]:
    """Rows of G6 and G7."""
    with distributed(ParallelConfig()) as layout:
        yield from masked_steps(layout, small, clock)
        for name, (preset, layers) in PLAIN.items():
            if not small:
                yield plain_step(layout, name, shape_of(preset, layers), clock)


def batch_for(layout: Layout, shape: ModelShape, small: bool = False) -> torch.Tensor:
    """Random tokens [sequences, length + 1]."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = (1, 33) if small else (SEQUENCES, LENGTH + 1)
    return torch.randint(0, shape.vocab_size, sizes, generator=generator).to(layout.device)


def masked_steps(layout: Layout, small: bool, clock: Clock) -> Iterator[dict[str, Any]]:
    """G6: a plain step; pruning with every unit alive; pruning at the published 2.7B and 1.3B sparsities."""
    source = replace(PRESETS["llama2-7b"], num_layers=LAYERS)
    targets = {name: PRESETS[f"sheared-{name.lower()}"] for name in ("2.7B", "1.3B")}
    # 1.3B has 24 of 32 layers: the same share of those here.
    targets = {name: replace(t, num_layers=LAYERS * t.num_layers // 32) for name, t in targets.items()}
    if small:
        source = ModelShape(64, 4, 4, 4, 16, 96, 128)
        targets = {"1.3B": ModelShape(32, 3, 2, 2, 16, 48, 128)}
    batch = batch_for(layout, source, small)
    weights = build_weights(source, layout, RandomWeights(source, SEED))
    living, numbers = all_living(layout, source, targets["1.3B"])
    contenders = {"plain": counted(our_step(layout, weights, None, batch), [0])}
    contenders["every unit alive"] = counted(our_step(layout, weights, living, batch), numbers)
    for name, target in targets.items():
        contenders[f"at {name}"] = counted(our_step(layout, weights, closed(layout, source, target), batch), [0])
    times = {"step": clock.race(contenders)}
    yield {"row": "G6", "case": f"step, 7B x {LAYERS} layers, {batch.shape[0]} x {batch.shape[1] - 1}", "times": times}


def plain_step(layout: Layout, name: str, shape: ModelShape, clock: Clock) -> dict[str, Any]:
    """G7: tokens per second and share of the GPU's peak in plain training."""
    batch = batch_for(layout, shape)
    weights = build_weights(shape, layout, RandomWeights(shape, SEED))
    times = clock.race({"megashear": counted(our_step(layout, weights, None, batch), [0])})
    tokens = 1e3 * SEQUENCES * LENGTH / times["megashear"]["ms"]
    flops = tokens * shape.flops_per_token(LENGTH)
    peak = peak_flops(torch.cuda.get_device_name())
    facts = {"tokens_per_second": tokens, "tflops": flops / 1e12, "mfu": None if peak is None else flops / peak}
    del weights
    torch.cuda.empty_cache()
    return {"row": "G7", "case": f"plain step, {name}", "times": {"step": times}, **facts}


def counted(step: Callable[[int], float], numbers: list[int]) -> Callable[[], object]:
    """Steps by their numbers, from the first again after the last."""
    done = 0

    def run() -> object:
        nonlocal done
        done += 1
        return step(numbers[(done - 1) % len(numbers)])

    return run
