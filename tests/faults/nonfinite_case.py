"""A run in which rank 1 meets a NaN in its loss in step 3 and in one gradient in step 5; called on live ranks."""

import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from helpers.jobs import world_kept
from helpers.tiny import finish
from megashear.config.load import load_config
from megashear.engine.collectives import gather_objects
from megashear.train import loop, step
from megashear.train.training_phase import Phase

LOSS, GRADIENT = 3, 5


def digest(phase: Phase) -> str:
    """Everything that a step may change; the weights' part is this rank's whole copy (data parallel)."""
    seen = hashlib.sha256()
    masks = phase.stepper.mask_optimizer
    assert masks is not None
    parameters = [p.detach() for chunk in phase.stepper.weights.chunks for p in chunk.parameters()]
    for tensor in [*parameters, *masks.state_dict().values()]:
        seen.update(tensor.contiguous().numpy().tobytes())
    return seen.hexdigest()


def poisoned_run(file: str) -> dict[str, Any]:
    """Digests of each rank's weights, optimizer and masks before the first step and after every step; skipped steps."""
    ranks: list[list[str]] = []
    skipped: list[int] = []
    original_step, original_loss = loop.train_step, step._mean_loss
    now = 0

    def train_step(phase: Phase) -> Any:
        nonlocal now
        if not ranks:
            ranks.append(gather_objects(digest(phase)))
            skipped.append(0)
        now = phase.counters.step + 1
        if now == GRADIENT and dist.get_rank() == 1:
            parameter = next(phase.stepper.weights.chunks[0].parameters())
            handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        result = original_step(phase)
        if now == GRADIENT and dist.get_rank() == 1:
            handle.remove()
        ranks.append(gather_objects(digest(phase)))
        skipped.append(phase.counters.skipped)
        return result

    def mean_loss(losses: torch.Tensor) -> Any:
        poison = float("nan") if now == LOSS and dist.get_rank() == 1 and losses.requires_grad else 1.0
        return original_loss(losses * poison)

    with world_kept(), patch.object(loop, "train_step", train_step), patch.object(step, "_mean_loss", mean_loss):
        # masks that settle by schedule would move in a skipped step too
        finish(load_config(Path(file), ["run.phases=[prune]", "prune.batch.steps=6", "prune.freeze_steps=0"]))
    return {"ranks": [list(one) for one in zip(*ranks, strict=True)], "skipped": skipped}
