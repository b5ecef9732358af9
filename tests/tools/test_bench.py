"""The benchmark scripts run: tiny sizes, on the CPU; what they measure is for `docs/results.md`, not for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"
BLOCKED = """
import runpy, sys
for name in ("megatron", "omegaconf", "orjson", "transformers", "tensorboard"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str | Path) -> str:
    environment = os.environ | {"MEGASHEAR_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_gpu_rows(tmp_path: Path) -> None:
    """Every row but G7, which needs a GPU's memory; results are compared with the reference on the way."""
    small = ["--device", "cpu", "--small", "--no-build"]
    run(BENCH / "gpu.py", *small, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["row"] for row in found["rows"]} == {"G1", "G2", "G3", "G6"}
    for row in found["rows"]:
        assert row.get("error", 0) < 2e-2 and all(
            time["ms"] > 0 for part in row["times"].values() for time in part.values()
        )


@pytest.mark.medium
def test_gpu_ops_need_torch_and_little_else() -> None:
    """G1 to G3 where there is no megatron-core, OmegaConf or orjson."""
    small = ["--device", "cpu", "--small", "--no-build", "--rows", "G1,G2,G3,G6"]
    told = run("-c", BLOCKED, BENCH / "gpu.py", *small)
    assert "G3 attention" in told


def test_a_gpu_is_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--no-build", "--rows", "G9"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--rows: give some of G1" in done.stderr


@pytest.mark.slow
def test_overheads(tmp_path: Path) -> None:
    run(BENCH / "overheads.py", "--rounds", "2", "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows.keys() == {"help", "mask step"} and all(row["seconds"] > 0 for row in rows.values())
