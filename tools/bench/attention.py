"""Masked attention on the CPU against torch's: forward and backward, results compared first.

    python tools/bench/attention.py [--threads 2] [--rounds 9] [--json FILE]

Torch's is scaled_dot_product_attention without masks; ours computes the gradient of head masks as well. Queries, keys
and values are views of one product [S, B, R], as in a layer. The three take turns: ours, ours with every other head
dead, torch's. The table shows the medians of the rounds, their spreads (half the distance between the quartiles, in
percent) and torch's time / ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megashear import ops
from megashear.files.atomic import write_json

SHAPES = [(4, 8, 8, 512, 64), (8, 10, 10, 256, 32), (2, 9, 3, 1024, 64), (1, 8, 8, 1024, 128), (1, 8, 2, 2048, 80)]
"""Sequences, query heads, groups, tokens, head size."""

DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 2e-2)}
"""Each with the largest relative distance between our results and torch's."""

NAMES = {"ours": "ours ms", "half": "half dead", "torch": "torch ms"}


def forms(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Each form as a function that gives the output and the gradients of queries, keys and values."""
    batch, heads, groups, tokens, head_dim = shape
    fused = torch.randn(tokens, batch, heads + 2 * groups, head_dim).to(dtype).permute(1, 2, 0, 3)
    q, k, v = (x.detach().requires_grad_() for x in fused.split([heads, groups, groups], dim=1))
    dout = torch.randn(tokens, batch, heads, head_dim).to(dtype).permute(1, 2, 0, 3)
    live = torch.ones(heads, requires_grad=True)
    half = (torch.arange(heads) % 2).float().requires_grad_()

    def ours(mask: Tensor) -> list[Tensor]:
        out = ops.attention(q, k, v, mask)
        return [out, *torch.autograd.grad(out, [q, k, v, mask], dout)[:3]]

    def torchs() -> list[Tensor]:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        return [out, *torch.autograd.grad(out, [q, k, v], dout)]

    return {"ours": lambda: ours(live), "half": lambda: ours(half), "torch": torchs}


def measure(shape: tuple[int, int, int, int, int], dtype: str, rounds: int) -> dict[str, object]:
    """One row: medians in milliseconds, and spreads in percent. Stops where results differ by more than roundings."""
    kind, limit = DTYPES[dtype]
    functions = forms(shape, kind)
    for ours, torchs in zip(functions["ours"](), functions["torch"](), strict=True):
        error = ((ours.double() - torchs.double()).norm() / torchs.double().norm()).item()
        if not error <= limit:
            raise SystemExit(f"{shape} {dtype}: results differ by {error:.1e}, beyond {limit:.0e}")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    row: dict[str, object] = {"shape": list(shape), "dtype": dtype}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        row |= {f"{name}_ms": median, f"{name}_spread": 50 * (high - low) / median}
    return row | {"speed": statistics.median(times["torch"]) / statistics.median(times["ours"])}


def main() -> None:
    """Measure every shape in both dtypes, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all forms, 7 or more")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error("--rounds must be 7 or more: a median of fewer says little")
    if ops.backend("cpu")["attention"] == "reference":
        parser.error("no kernel of attention serves here, so there is nothing to compare")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'B, H, G, S, d':24} dtype" + "".join(f"{name:>10}  +-%" for name in NAMES.values()) + " speed")
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            row = measure(shape, dtype, options.rounds)
            rows.append(row)
            times = "".join(f"{row[f'{name}_ms']:10.2f} {row[f'{name}_spread']:4.0f}" for name in NAMES)
            print(f"{', '.join(map(str, shape)):24} {dtype:5}{times} {row['speed']:5.2f}", flush=True)
    if options.json is not None:
        write_json(options.json, {"threads": options.threads, "rows": rows})


if __name__ == "__main__":
    main()
