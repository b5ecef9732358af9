"""What a run pays beside its model: the start of the command, and the mask module's own step at the shape of 7B.

    python tools/bench/overheads.py [--threads 2] [--rounds 15] [--json FILE]

`help`: seconds of `megashear --help`, a process each time. `mask step`: milliseconds of one optimizer step's work on
0.36 million mask units of LLaMA2-7B pruned to 1.3B: a sample, its backward, the Lagrangian and its gradients, the norm,
Adam with the clamp. One untimed round first; medians, and half the distance between the quartiles.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megashear.config.presets import resolve_shape
from megashear.config.schema import ShapeConfig
from megashear.config.training_schema import PruneConfig
from megashear.engine.device import keep_freed_memory
from megashear.files.atomic import write_json
from megashear.masks.mask_optimizer import MaskOptimizer, build_mask_optimizer

SEED = 1


def start_command() -> None:
    """Run `megashear --help` to its end."""
    subprocess.run([sys.executable, "-m", "megashear", "--help"], check=True, stdout=subprocess.DEVNULL)


def learned(masks: MaskOptimizer, number: int) -> dict[str, Tensor]:
    """A step's sample, without what has no gradient (the norms' gain)."""
    return {name: value for name, value in vars(masks.masks.sample(SEED, number, 0)).items() if value.requires_grad}


def mask_step() -> Callable[[], None]:
    """A step of the mask module at the shapes of 7B and 1.3B, its number counting up."""
    source = resolve_shape(ShapeConfig(preset="llama2-7b"), None)
    masks = build_mask_optimizer(source, resolve_shape(ShapeConfig(preset="sheared-1.3b"), source), PruneConfig(), SEED)
    upstream = {name: torch.ones_like(value) for name, value in learned(masks, 0).items()}
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        masks.zero_gradients()
        drawn = learned(masks, number)
        torch.autograd.backward(list(drawn.values()), [upstream[name] for name in drawn])
        masks.add_constraint_gradients(number)
        masks.grad_norm_squared()
        masks.step(1.0, number)

    return step


def seconds(work: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median and spread (half the distance between the quartiles, as a share) of the work's time."""
    work()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    low, median, high = statistics.quantiles(taken, n=4)
    return {"seconds": median, "spread": (high - low) / 2 / median}


def main() -> None:
    """Measure both, print them, write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()  # as a run does
    found = {"help": seconds(start_command, chosen.rounds), "mask step": seconds(mask_step(), chosen.rounds)}
    for name, row in found.items():
        print(f"{name:10} {1e3 * row['seconds']:8.2f} ms +- {row['spread']:.1%}")
    if chosen.json is not None:
        write_json(chosen.json, {"threads": chosen.threads, "rounds": chosen.rounds, "rows": found})


if __name__ == "__main__":
    main()
