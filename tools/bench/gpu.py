"""The kernels and the training step on one GPU: built, checked, measured, in one command of less than 10 minutes.

    python tools/bench/gpu.py [--json FILE] [--rows G1,G2,G3,G6,G7] [--no-build] [--rounds 11]

First the two ceilings: a device-to-device copy and an 8192^3 bf16 product. Then G1 masked SwiGLU, G2 masked RMSNorm
with residual, G3 masked attention, forward and backward with the masks' gradients, as shares of the measured copy or as
TFLOP/s, against torch eager, torch.compile, Liger and megatron-core where they can be imported, SDPA and FlexAttention;
G6 a pruning step against a plain one and G7 the plain step's utilisation, where megatron-core can be imported. Results
are compared with the fp32 reference before times are taken; everyone takes turns. Needs no network. `--device cpu
--small` tries the script itself.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROWS = ("G1", "G2", "G3", "G6", "G7")
GIB = 1 << 30


def build() -> None:
    """Compile csrc in place for CUDA, and for the CPU; raises SystemExit where it fails."""
    environment = os.environ | {"MEGASHEAR_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise SystemExit("csrc did not build, see above")


def ceilings(clock: Any, small: bool) -> dict[str, float]:
    """Bytes a second of a large copy, read and written, and FLOP/s of a large bf16 product."""
    import torch

    elements = (1 << 20) if small else GIB
    source = torch.randint(0, 255, (elements,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    side = 64 if small else 8192
    a, b = (torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2))
    times = clock.race({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {"copy": 2e3 * elements / times["copy"]["ms"], "product": 2e3 * side**3 / times["product"]["ms"]}


def cases(rows: list[str], clock: Any, small: bool) -> Iterator[dict[str, Any]]:
    """Measure what was asked for."""
    import gpu_ops

    makers = {"G1": gpu_ops.swiglu_cases, "G2": gpu_ops.norm_cases, "G3": gpu_ops.attention_cases}
    for row, make in makers.items():
        for case in make(clock.device, small) if row in rows else ():
            found = gpu_ops.measure(case, clock)
            yield found | {"bytes": case.bytes, "flops": case.flops}
    if not {"G6", "G7"} & set(rows):
        return
    if importlib.util.find_spec("megatron") is None:
        print("G6, G7: not measured, megatron-core cannot be imported")
        return
    import gpu_steps

    yield from (found for found in gpu_steps.steps(small, clock) if found["row"] in rows)


def report(found: dict[str, Any], ceiling: dict[str, float]) -> None:
    """Print a case: milliseconds of everyone, our share of the ceiling, our speed over each peer's."""
    error = f", error {found['error']:.1e}" if "error" in found else ""
    print(f"{found['row']} {found['case']}{error}")
    for number, (part, times) in enumerate(found["times"].items()):
        first = next(iter(times.values()))["ms"]
        for name, time in times.items():
            line = f"    {part:9}{name:26}{time['ms']:10.4f} ms +-{time['spread']:5.1%}{time['ms'] / first:8.3f}"
            if name == "megashear" and found.get("bytes", (0, 0))[number % 2]:
                line += f"   {found['bytes'][number] / time['ms'] * 1e3 / ceiling['copy']:6.1%} of the copy"
            if "flops" in found and found["flops"][number % 2]:
                line += f"   {found['flops'][number] / time['ms'] / 1e9:7.1f} TFLOP/s"
            print(line, flush=True)
    for name, problem in found.get("failed", {}).items():
        print(f"    not measured: {name}: {problem}")
    if found.get("mfu") is not None:
        print(f"    {found['tokens_per_second']:.0f} tokens/s, {found['tflops']:.0f} TFLOP/s, MFU {found['mfu']:.1%}")


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of all contenders, 7 or more")
    parser.add_argument("--no-build", action="store_true", help="take the libraries that are there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--json", type=Path, help="file to write")
    chosen = parser.parse_args()
    rows = chosen.rows.split(",")
    if set(rows) - set(ROWS):
        parser.error(f"--rows: give some of {', '.join(ROWS)}")
    if not chosen.no_build:
        build()

    import torch
    from gpu_clock import Clock

    from megashear import ops
    from megashear.files.atomic import write_json

    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is in reach; --device cpu --small tries the script alone")
    device = torch.device(chosen.device, *([0] if chosen.device == "cuda" else []))
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    torch.manual_seed(0)
    clock = Clock(device, max(7, chosen.rounds))
    served = ops.backend(device)
    print(f"{name}, torch {torch.__version__}; ops: {', '.join(sorted(set(served.values())))}")
    ceiling = ceilings(clock, chosen.small)
    print(f"copy {ceiling['copy'] / 1e12:.2f} TB/s, product {ceiling['product'] / 1e12:.0f} TFLOP/s", flush=True)
    found = []
    for one in cases(rows, clock, chosen.small):
        report(one, ceiling)
        found.append(one)
    if chosen.json is not None:
        write_json(chosen.json, {"device": name, "torch": torch.__version__, "ceilings": ceiling, "rows": found})


if __name__ == "__main__":
    main()
