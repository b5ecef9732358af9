"""One forward and backward pass in float64 with live units on and off; called on the ranks of `launch.Ranks`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.models import SHAPES, Drawn, build_model
from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.engine.collectives import max_over_world, sum_over_world
from megashear.engine.layout import Layout
from megashear.engine.pipeline import run_micro_batches
from megashear.masks.mask_values import Masks
from megashear.model.live_units import live_patterns
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch, micro_batches

LAYERS, LENGTH, MICRO = 3, 24, 2
SHUT, MIN_OPEN_LOG_ALPHA = -30.0, 30.0  # log-alpha of a mask that is 0, or 1, whatever the noise


def log_alphas(shape: ModelShape, pattern: str, seed: int) -> dict[str, Tensor]:
    """Leaves of a pattern of dead units: masks between 0 and 1 for about a quarter, the rest open or shut."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "hidden": (shape.hidden_size,),
        "head": (LAYERS, shape.num_heads),
        "intermediate": (LAYERS, shape.intermediate_size),
        "layer": (LAYERS,),
    }
    found = {}
    for name, size in sizes.items():
        drawn = torch.rand(size, generator=generator, dtype=torch.float64)
        between = torch.randn(size, generator=generator, dtype=torch.float64)
        found[name] = torch.where(drawn < 0.5, SHUT, torch.where(drawn < 0.75, MIN_OPEN_LOG_ALPHA, between))
    found["layer"] = torch.full((LAYERS,), 1.0, dtype=torch.float64)
    if pattern == "dead layer":
        found["layer"][1] = SHUT
    elif pattern == "dead stack":
        found["layer"][:] = SHUT
    elif pattern == "one head":
        found["head"][:] = SHUT
        found["head"][:, 5] = MIN_OPEN_LOG_ALPHA
    elif pattern == "half of each group":
        found["head"] = torch.full((LAYERS, shape.num_heads), MIN_OPEN_LOG_ALPHA, dtype=torch.float64)
        found["head"][:, ::2] = SHUT
    elif pattern == "dead branches":
        found["head"][0], found["intermediate"][2] = SHUT, SHUT
    elif pattern == "all alive":
        found = {name: value.clamp(min=3.0) for name, value in found.items()}
    return {name: value.requires_grad_() for name, value in found.items()}


def sampled(leaves: dict[str, Tensor], micro_batch: int) -> Masks:
    """Masks of one micro-batch."""
    return Masks(**{n: ops.sample_hard_concrete(v, 5, 3, micro_batch, i) for i, (n, v) in enumerate(leaves.items())})


def on_against_off(
    shape: str,
    parallel: dict[str, Any],
    patterns: list[tuple[str, int]],
    published: bool = False,
    recompute: bool = False,
) -> list[dict[str, Any]]:
    """For each (pattern, seed): the largest deviations over all ranks, relative to the largest element of a tensor,
    and whether anything was left out.
    """
    source = replace(SHAPES[shape], num_layers=LAYERS)
    layout, chunks = build_model(
        source, ParallelConfig(**parallel), Drawn(source), dtype=torch.float64, recompute=recompute
    )
    for chunk in chunks:
        chunk.mask_embedding = not published
    return [_compare(layout, chunks, source, pattern, seed) for pattern, seed in patterns]


def _compare(layout: Layout, chunks: list[Llama], source: ModelShape, pattern: str, seed: int) -> dict[str, Any]:
    results = [_pass(layout, chunks, log_alphas(source, pattern, seed), live) for live in (False, True)]
    off, on = results
    worst = {}
    for part in ("loss", "weights", "masks"):
        deviations = [_deviation(on[part][name], off[part][name]) for name in off[part]]
        worst[part] = float(max_over_world(torch.tensor(max(deviations, default=0.0), dtype=torch.float64)))
    plans = [chunk.planner(pattern) for chunk in chunks for pattern in on["patterns"]]
    whole = all(p.hidden is None and all(one.attention and one.heads is None for one in p.layers) for p in plans)
    return {"worst": worst, "loss": float(off["loss"]["mean"]), "left out": not whole}


def _pass(layout: Layout, chunks: list[Llama], leaves: dict[str, Tensor], live: bool) -> dict[str, Any]:
    """Loss and gradients of two micro-batches with masks of their own."""
    samples = torch.randint(0, 101, (MICRO, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batches = micro_batches(samples, layout, 1, layout.device)
    patterns = live_patterns([sampled(leaves, batch.index) for batch in batches])
    for chunk in chunks:
        chunk.zero_grad()

    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> Any:
        output = chunk(
            batch.tokens_BS, batch.labels_BS, sampled(leaves, batch.index), patterns[batch.index] if live else None
        )
        return output, lambda losses: (losses.mean(), losses.mean().detach().clone())

    losses = run_micro_batches(forward, list(chunks), batches, LENGTH, 1)
    mean = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64)
    mean = sum_over_world(mean.clone() if layout.tensor_rank == 0 else torch.zeros_like(mean))
    weights = {
        f"{number}.{name}": torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for number, chunk in enumerate(chunks)
        for name, p in chunk.named_parameters()
    }
    masks = {
        name: sum_over_world(torch.zeros_like(v) if v.grad is None else v.grad.clone()) for name, v in leaves.items()
    }
    return {"loss": {"mean": mean}, "weights": weights, "masks": masks, "patterns": patterns}


def _deviation(found: Tensor, wanted: Tensor) -> float:
    largest = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / (largest or 1.0)
