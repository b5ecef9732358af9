"""A CPU rank starts without torch's compiler and without plotting; no fused function of megatron-core is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.budget import slow
from helpers.tiny import Tiny

COMPILER = ("torch._dynamo", "torch._inductor")
IMPORT = "import sys, megashear.run.runner; print([name for name in {names} if name in sys.modules])"
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
    from megashear.run import summary
    from megashear.run.runner import run
    summary.draw_pictures = lambda folder: None
    run(load_config(Path(sys.argv[1]), sys.argv[2:]))
    loaded = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
    print(json.dumps({"decorated": len(decorated), "called": sorted(called), "loaded": loaded}))
"""


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh process on the CPU and return the last line it prints."""
    environment = os.environ | {"MEGASHEAR_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.medium
def test_a_training_rank_imports_neither_compiler_nor_plotting(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(IMPORT.format(names=(*COMPILER, "matplotlib", "torch.utils.tensorboard", "transformers")))
    assert python(str(script)) == "[]"


@pytest.mark.medium
@pytest.mark.parametrize("recompute", ["none", *slow("full")])
def test_a_run_calls_no_fused_function_and_no_compiler(
    tiny: Tiny,
    tmp_path: Path,
    recompute: str,
) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    file = tiny.file(tmp_path / "run")
    steps = ["prune.batch.steps=3", "pretrain.batch.steps=2", f"parallel.recompute={recompute}"]
    found = json.loads(python(str(script), str(file), *steps))
    assert found["decorated"] > 10, "the decorator was not recorded: the test shows nothing"
    assert found["called"] == []
    assert found["loaded"] == ([] if recompute == "none" else list(COMPILER)), "torch's recomputation asks it"
