"""The compiled ops against plain torch on the CPU: forward and backward, the same inputs, results compared first.

    python tools/bench/ops.py [--threads 2] [--rounds 9] [--json FILE]

Shapes are those of a layer with hidden size 512 and intermediate size 1376 on 2048 tokens, and the 0.36 million mask
units of a 7B model. Both forms take turns; the table shows the median of the rounds, their spread (half the distance
between the quartiles, in percent of the median) and the ratio of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megashear import ops
from megashear.files.atomic import write_json
from megashear.ops import reference

SEQUENCE, BATCH, HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, UNITS = 512, 4, 512, 1376, 8, 64, 360_000
EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One op: tensors that want gradients, and the op's two forms as functions of them."""

    name: str
    dtype: str
    leaves: list[Tensor]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds."""

    op: str
    dtype: str
    ours_ms: float
    ours_spread: float
    eager_ms: float
    eager_spread: float
    ratio: float


def cases() -> list[Case]:
    """Every op in every dtype that its kernel serves in training."""
    found = [case for dtype in DTYPES for case in _layer_cases(dtype)]
    noise = torch.rand(UNITS).clamp(1e-6, 1 - 1e-6)
    found.append(
        Case(
            "hard_concrete",
            "fp32",
            [torch.randn(UNITS)],
            lambda log_alpha: ops.hard_concrete(log_alpha, noise),
            lambda log_alpha: reference.hard_concrete(log_alpha, noise),
        )
    )
    return found


def _layer_cases(dtype: str) -> list[Case]:
    def matrix(width: int) -> Tensor:
        return torch.randn(SEQUENCE, BATCH, width).to(DTYPES[dtype])

    mask, mask_F = torch.rand(HIDDEN), torch.rand(INTERMEDIATE)
    norm, branch_mask = torch.randn(HIDDEN), torch.rand(HIDDEN)
    tables = ops.rope_tables(HEAD_DIM, SEQUENCE, 10000.0)
    heads = (HEADS, 1, HEAD_DIM, *tables)
    return [
        Case("swiglu", dtype, [matrix(2 * INTERMEDIATE), mask_F], ops.swiglu, reference.swiglu),
        Case(
            "rms_norm",
            dtype,
            [matrix(HIDDEN), norm, mask],
            lambda x, weight, mask: ops.rms_norm(x, weight, EPS, mask),
            lambda x, weight, mask: reference.rms_norm(x, weight, EPS, mask),
        ),
        Case(
            "add_rms_norm",
            dtype,
            [matrix(HIDDEN), matrix(HIDDEN), branch_mask, norm, mask],
            lambda x, branch, factor, weight, mask: ops.add_rms_norm(x, branch, factor, weight, EPS, mask),
            lambda x, branch, factor, weight, mask: reference.add_rms_norm(x, branch, factor, weight, EPS, mask),
        ),
        Case(
            "rope_qkv",
            dtype,
            [matrix(3 * HEADS * HEAD_DIM)],
            lambda qkv: ops.rope_qkv(qkv, *heads),
            lambda qkv: reference.rope_qkv(qkv, *heads),
        ),
    ]


def run(form: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of one forward and backward pass."""
    inputs = [x.requires_grad_() for x in leaves]
    outputs = _tuple(form(*inputs))
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return [*(out.detach() for out in outputs), *gradients]


def compare(case: Case, upstream: list[Tensor]) -> None:
    """Stop where the two forms differ by more than a few roundings of the dtype, relative to a tensor's norm."""
    limit = 1e-5 if case.dtype == "fp32" else 2e-2
    both = zip(run(case.ours, case.leaves, upstream), run(case.eager, case.leaves, upstream), strict=True)
    for i, (ours, eager) in enumerate(both):
        error = ((ours.double() - eager.double()).norm() / eager.double().norm().clamp(min=1e-30)).item()
        if not error <= limit:
            raise SystemExit(f"{case.name} {case.dtype}: result {i} differs by {error:.1e}, beyond {limit:.0e}")


def measure(case: Case, rounds: int) -> Row:
    """Times of both forms, taken in turns."""
    with torch.no_grad():
        outputs = _tuple(case.ours(*case.leaves))
    upstream = [torch.randn(out.shape).to(out.dtype) for out in outputs]
    compare(case, upstream)
    times: dict[str, list[float]] = {"ours": [], "eager": []}
    repeats = 8
    for _ in range(rounds):
        for name, form in (("ours", case.ours), ("eager", case.eager)):
            start = time.perf_counter()
            for _ in range(repeats):
                run(form, case.leaves, upstream)
            times[name].append(1e3 * (time.perf_counter() - start) / repeats)
    ours, eager = statistics.median(times["ours"]), statistics.median(times["eager"])
    return Row(case.name, case.dtype, ours, _spread(times["ours"]), eager, _spread(times["eager"]), ours / eager)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _spread(times: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return 50 * (high - low) / statistics.median(times)


def main() -> None:
    """Measure every case, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of both forms, 7 or more")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error("--rounds must be 7 or more: a median of fewer says little")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'op':14} {'dtype':6} {'ours ms':>9} {'+-%':>5} {'eager ms':>9} {'+-%':>5} {'ratio':>6}")
    rows = []
    for case in cases():
        row = measure(case, options.rounds)
        rows.append(row)
        times = f"{row.ours_ms:9.3f} {row.ours_spread:5.1f} {row.eager_ms:9.3f} {row.eager_spread:5.1f}"
        print(f"{row.op:14} {row.dtype:6} {times} {row.ratio:6.2f}", flush=True)
    if options.json is not None:
        write_json(options.json, {"threads": options.threads, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
