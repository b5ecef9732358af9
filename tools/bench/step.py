"""The time of a training step on the CPU, whole: forward, backward, clipping, Adam. Four comparisons.

    python tools/bench/step.py plain    ours against transformers' LlamaForCausalLM, same weights and tokens
    python tools/bench/step.py masked   a pruning step in which every unit lives, against a plain step
    python tools/bench/step.py live     pruning steps at the sparsities of Sheared-LLaMA 2.7B and 1.3B, against plain
    python tools/bench/step.py taught   a plain step with a teacher of its own shape, against one without
    ... [--threads 2] [--rounds 7] [--steps 1] [--json FILE]

The model is a LLaMA of 58 million parameters in bf16, on 4 sequences of 512 tokens. Everyone has a process of its own;
they take turns, `--steps` steps each a round. The table shows the median of the rounds, the spread (half the distance
between the quartiles, in percent) and tokens per second. Losses are compared before times are taken. transformers runs
torch's fused AdamW on bf16 weights, without clipping; ours keeps fp32 masters, accumulates in fp32 and clips. Its
second row has memory kept by the process as ours does (`engine/device.py`), which is no part of transformers.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megashear.config.model_shape import ModelShape
from megashear.config.resolve import DistillationPlan, teacher_flops_per_token
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import OptimizerConfig, PruneConfig
from megashear.engine.device import keep_freed_memory
from megashear.engine.layout import Layout, distributed
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.engine.pipeline import build_chunks
from megashear.files.atomic import write_json
from megashear.hf.model_folder import ModelFolder
from megashear.masks.mask_optimizer import MaskOptimizer, build_mask_optimizer
from megashear.model.live_units import flops_share, live_patterns
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch
from megashear.model.weight_io import RandomWeights, TensorSource, load_weights
from megashear.train.step import Stepper
from megashear.train.teacher import Teacher

SHAPE = ModelShape(512, 8, 8, 8, 64, 1376, 32000)
TARGETS = {  # the published shapes' shares of 7B, taken of SHAPE
    "live 2.7B": replace(SHAPE, hidden_size=320, num_heads=5, num_query_groups=5, intermediate_size=864),
    "live 1.3B": replace(SHAPE, hidden_size=256, num_heads=4, num_query_groups=4, intermediate_size=688, num_layers=6),
}
BATCH, LENGTH, RATE, SEED = 4, 512, 1e-4, 1
MODES = {
    "plain": ("megashear", "transformers", "transformers, memory kept"),
    "masked": ("plain", "masked"),
    "live": ("plain", *TARGETS),
    "taught": ("plain", "taught"),
}
AGREEMENT = 2e-3
"""Largest relative difference of the first loss between two bf16 models of equal weights."""

Step = Callable[[int], float]
"""Runs one step of a number and returns its loss."""


def tokens() -> torch.Tensor:
    """The batch [BATCH, LENGTH + 1] of every step."""
    return torch.randint(0, SHAPE.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(SEED))


def build_weights(shape: ModelShape, layout: Layout, source: TensorSource) -> WeightOptimizer:
    """Our model in bf16 under its optimizer."""
    return WeightOptimizer(
        build_model(shape, layout, source), OptimizerConfig(learning_rate=RATE), torch.bfloat16, True
    )


def build_model(shape: ModelShape, layout: Layout, source: TensorSource) -> list[Llama]:
    """Our model in bf16."""
    core = transformer_config(shape, ParallelConfig(), torch.bfloat16)

    def build(layers: range, pre: bool, post: bool, stage: int | None) -> Llama:
        return Llama(shape, core, layout, layers, pre, post, vp_stage=stage)

    chunks = build_chunks(shape.num_layers, layout, build)
    for chunk in chunks:
        load_weights(chunk, source)
    return chunks


def our_step(
    layout: Layout,
    weights: WeightOptimizer,
    masks: MaskOptimizer | None,
    batch: torch.Tensor,
    teacher: Teacher | None = None,
) -> Step:
    """A step of our trainer on a batch [sequences, length + 1]."""
    stepper = Stepper(layout, weights, masks, SEED, len(batch), clip_norm=1.0, clip_jointly=True, teacher=teacher)
    batches = [MicroBatch(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), 0)]
    return lambda number: stepper.run(batches, number, 1.0, RATE).loss


def still_masks(layout: Layout, source: ModelShape, target: ModelShape, log_alpha: float) -> MaskOptimizer:
    """Masks that do not learn."""
    config = PruneConfig(
        constraint="lagrangian",
        mask_learning_rate=0.0,
        lambda_learning_rate=0.0,
        sharpening=1.0,
        freeze_steps=0,
        log_alpha_init=log_alpha,
        log_alpha_limit=100.0,
    )
    return build_mask_optimizer(source, target, config, SEED, layout.device)


def all_living(layout: Layout, source: ModelShape, target: ModelShape) -> tuple[MaskOptimizer, list[int]]:
    """Masks of every granularity, a few of them below 1 and none 0, and step numbers whose noise leaves it so."""
    masks = still_masks(layout, source, target, 8.0)

    def lives(number: int) -> bool:
        values = vars(masks.masks.sample(SEED, number, 0)).values()
        return all(bool((value > 0).all()) for value in values if value is not None)

    return masks, [number for number in range(2000) if lives(number)]


def closed(layout: Layout, source: ModelShape, target: ModelShape) -> MaskOptimizer:
    """Masks of 0 and 1 that leave the target's sizes, units chosen at random."""
    masks = still_masks(layout, source, target, 50.0)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for spec in masks.masks.specs:
            order = torch.rand(spec.rows, spec.units, generator=generator).argsort(-1)
            dead = (order < spec.zeros_per_row).view(spec.shape)
            masks.masks.log_alpha[spec.name][dead.to(layout.device)] = -50.0
    return masks


def peer_step(folder: Path) -> Step:
    """A step of transformers with the same weights."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batch = tokens()
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step(_: int) -> float:
        loss = model(input_ids=inputs, labels=inputs, shift_labels=labels, use_cache=False).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    return step


def write_peer(folder: Path) -> None:
    """A transformers folder of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_query_groups,
        intermediate_size=SHAPE.intermediate_size,
        rms_norm_eps=SHAPE.norm_eps,
    )
    model: Any = LlamaForCausalLM(config)  # transformers wraps `to` so that its types are lost
    model.to(torch.bfloat16).save_pretrained(folder)


def contend(name: str, folder: Path, threads: int, pipe: Connection) -> None:
    """One process: says its FLOP share, then the loss and seconds of as many steps as it is asked for each time."""
    torch.set_num_threads(threads)
    if name.startswith("transformers"):
        if name.endswith("memory kept"):
            keep_freed_memory()
        _serve(peer_step(folder), list(range(2000)), None, pipe)
        return
    with distributed(ParallelConfig()) as layout:
        source = ModelFolder.open(folder) if name == "megashear" else RandomWeights(SHAPE, SEED)
        masks, numbers = None, list(range(2000))
        if name == "masked":
            masks, numbers = all_living(layout, SHAPE, TARGETS["live 1.3B"])
        elif name in TARGETS:
            masks = closed(layout, SHAPE, TARGETS[name])
        share = teacher = None
        if name == "taught":
            taught = build_model(SHAPE, layout, RandomWeights(SHAPE, SEED + 1))
            teacher = Teacher(taught, DistillationPlan(0.5), layout)
            share = 1 + teacher_flops_per_token(SHAPE, LENGTH) / SHAPE.flops_per_token(LENGTH)
        if masks is not None:
            with torch.no_grad():
                (pattern,) = live_patterns([masks.masks.sample(SEED, numbers[0], 0)])
            share = flops_share(pattern, SHAPE, LENGTH)
        weights = build_weights(SHAPE, layout, source)
        _serve(our_step(layout, weights, masks, tokens(), teacher), numbers, share, pipe)


def _serve(step: Step, numbers: list[int], share: float | None, pipe: Connection) -> None:
    pipe.send((share, step(numbers[0])))
    done = 1
    while (count := pipe.recv()) > 0:
        started = time.perf_counter()
        for number in numbers[done : done + count]:
            step(number)
        pipe.send((time.perf_counter() - started) / count)
        done += count


def measure(mode: str, threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of everyone in every round, after one round that does not count; raises SystemExit where losses
    differ.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if mode == "plain":
            write_peer(folder)
        shares, losses = {}, {}
        for name in MODES[mode]:
            pipes[name], theirs = context.Pipe()
            context.Process(target=contend, args=(name, folder, threads, theirs), daemon=True).start()
            shares[name], losses[name] = pipes[name].recv()
    first, *others = losses.values()
    if mode == "plain" and any(abs(loss / first - 1) > AGREEMENT for loss in others):
        raise SystemExit(f"the models do not agree: first losses {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(steps)
            taken = pipe.recv()
            if number:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(0)
    found = {"mode": mode, "threads": threads, "steps": steps, "losses": losses, "flop_shares": shares}
    return found | {"seconds": seconds, "rows": rows(seconds)}


def rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The table: median, spread, tokens per second, and time over that of the first row."""
    table = []
    for name, times in seconds.items():
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        median = statistics.median(times)
        ratios = [time / first for time, first in zip(times, next(iter(seconds.values())), strict=True)]
        table.append(
            {
                "name": name,
                "median": median,
                "spread": (quartiles[2] - quartiles[0]) / 2 / median,
                "tokens_per_second": BATCH * LENGTH / median,
                "time_over_first": statistics.median(ratios),
            }
        )
    return table


def main() -> None:
    """Measure one comparison, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=sorted(MODES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of everyone in a round")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    chosen = parser.parse_args()
    found = measure(chosen.mode, chosen.threads, chosen.rounds, chosen.steps)
    print(f"{chosen.mode}: {chosen.threads} threads, {chosen.rounds} rounds, losses {found['losses']}")
    print(f"{'':28}{'s/step':>8}{'+-':>7}{'tok/s':>8}{'time/first':>12}{'FLOPs':>8}")
    for row in found["rows"]:
        share = found["flop_shares"][row["name"]]
        told = "" if share is None else f"{share:.2f}"
        print(
            f"{row['name']:28}{row['median']:8.3f}{row['spread']:7.1%}{row['tokens_per_second']:8.0f}"
            f"{row['time_over_first']:12.3f}{told:>8}"
        )
    if chosen.json is not None:
        write_json(chosen.json, found)


if __name__ == "__main__":
    main()
