"""Under torchrun: a run in which rank 1 meets a NaN in its loss in the 3rd step and in one gradient in the 5th.

Writes, after every step, the digest of each rank's weights, optimizer, masks and multipliers.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from run_stages.tiny import finish

from megashear.config.load import load_config
from megashear.engine.collectives import gather_objects
from megashear.train import loop, step
from megashear.train.stage import Stage

LOSS, GRADIENT = 3, 5
now = 0


def digest(stage: Stage) -> str:
    """Everything that a step may change; the weights' part is this rank's whole copy (data parallel)."""
    seen = hashlib.sha256()
    masks = stage.stepper.masks
    assert masks is not None
    parameters = [p.detach() for chunk in stage.stepper.weights.chunks for p in chunk.parameters()]
    for tensor in [*parameters, *masks.state_dict().values()]:
        seen.update(tensor.contiguous().numpy().tobytes())
    return seen.hexdigest()


def main() -> None:
    file, output = Path(sys.argv[1]), Path(sys.argv[2])
    ranks: list[list[str]] = []
    skipped: list[int] = []
    original_step, original_loss = loop.train_step, step._mean_loss

    def train_step(stage: Stage) -> Any:
        global now
        if not ranks:
            ranks.append(gather_objects(digest(stage)))
            skipped.append(0)
        now = stage.counters.step + 1
        if now == GRADIENT and os.environ["RANK"] == "1":
            parameter = next(stage.stepper.weights.chunks[0].parameters())
            handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        result = original_step(stage)
        if now == GRADIENT and os.environ["RANK"] == "1":
            handle.remove()
        ranks.append(gather_objects(digest(stage)))
        skipped.append(stage.counters.skipped)
        return result

    def mean_loss(losses: torch.Tensor) -> Any:
        poison = float("nan") if now == LOSS and os.environ["RANK"] == "1" and losses.requires_grad else 1.0
        return original_loss(losses * poison)

    with patch.object(loop, "train_step", train_step), patch.object(step, "_mean_loss", mean_loss):
        # masks that settle by schedule would move in a skipped step too
        finish(load_config(file, ["run.stages=[prune]", "prune.batch.steps=6", "prune.settle_steps=0"]))
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps({"ranks": list(zip(*ranks, strict=True)), "skipped": skipped}))


if __name__ == "__main__":
    main()
