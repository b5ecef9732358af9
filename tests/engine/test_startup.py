"""A CPU rank starts without torch's compiler and without plotting; no fused function of megatron-core is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.budget import slow
from helpers.tiny import Tiny

ROOT = Path(__file__).resolve().parents[2]
COMPILER = ("torch._dynamo", "torch._inductor")
IMPORT = "import sys, megashear.phases.runner; print([name for name in {names} if name in sys.modules])"
RUN = """
import functools, json, sys
from pathlib import Path
import torch

decorated, called = [], set()

def record(function):
    decorated.append(function.__qualname__)
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        called.add(function.__qualname__)
        return function(*args, **kwargs)
    return wrapper

if __name__ == "__main__":
    compile_function, torch.compile = torch.compile, record
    import megatron.core
    torch.compile = compile_function
    from megashear.config.load import load_config
    from megashear.phases import summary
    from megashear.phases.runner import run
    summary.draw_pictures = lambda folder: None
    run(load_config(Path(sys.argv[1]), sys.argv[2:]))
    loaded = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
    print(json.dumps({"decorated": len(decorated), "called": sorted(called), "loaded": loaded}))
"""


AFTER = """
import torch, megashear.engine
from torch._dynamo.utils import counters

optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
steps = []
optimizer.register_step_post_hook(lambda *_: steps.append(1))

def train(x):
    loss = (optimizer.param_groups[0]["params"][0] * x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

compiled = torch.compile(train, backend="eager")
assert [float(compiled(torch.ones(3))) for _ in range(2)][0] == 3.0
assert len(steps) == 2
assert sum(counters["graph_break"].values()) > 0, "the optimizer is hidden from the compiler"
print("done")
"""


def python(script: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a script in a fresh process, or by a launcher, on the CPU; returns the last line it prints."""
    environment = os.environ | {"MEGASHEAR_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.medium
def test_training_imports_no_compiler_or_plotting(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(IMPORT.format(names=(*COMPILER, "matplotlib", "torch.utils.tensorboard", "transformers")))
    assert python(script) == "[]"


@pytest.mark.medium
def test_user_code_can_compile_training(tmp_path: Path) -> None:
    script = tmp_path / "compile.py"
    script.write_text(AFTER)
    assert python(script) == "done"


LAYOUTS = {
    "one rank": (1, []),
    "recompute": (1, ["parallel.recompute=full"]),
    "tensor": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "data": (2, []),
}


@pytest.mark.medium
@pytest.mark.parametrize("layout", ["one rank", *slow("recompute", "tensor", "pipeline", "data")])
def test_run_uses_no_fused_function_or_compiler(tiny: Tiny, tmp_path: Path, layout: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    ranks, overrides = LAYOUTS[layout]
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    steps = ["prune.batch.steps=3", "pretrain.batch.steps=2", *overrides]
    found = json.loads(python(script, str(tiny.file(tmp_path / "run")), *steps, launcher=launcher))
    assert found["decorated"] > 10, "the decorator was not recorded: the test shows nothing"
    assert found["called"] == []
    if layout != "recompute":  # torch's recomputation imports the compiler
        assert found["loaded"] == []
