"""Pictures of real record files: they are there, of the right size, and hold what was recorded."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic_run import SyntheticRun
from megashear.errors import DataError
from megashear.plots.run_plots import plot_run, read_masks
from megashear.train.metrics import Metrics

pytestmark = pytest.mark.medium  # draws many pictures

ALL = [
    "epochs.png",
    "losses.png",
    "masks.png",
    "multipliers.png",
    "sparsity.png",
    "speed.png",
    "training.png",
    "weights.png",
]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def pixels(path: Path) -> np.ndarray:
    """The picture as [height, width, 3]."""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_every_picture_of_a_whole_run(published_run: Path, tmp_path: Path) -> None:
    written = plot_run(published_run, tmp_path)
    assert sorted(path.name for path in written) == ALL
    assert sorted(path.name for path in tmp_path.iterdir()) == ALL, "no temporary file is left"
    for path in written:
        width, height = png_size(path)
        assert 1100 <= width <= 2600 and 600 <= height <= 1500
        image = pixels(path)
        assert (image < 0.9).any(axis=2).mean() > 0.01, f"{path.name} is blank"
        margin = np.concatenate([image[:4].ravel(), image[-4:].ravel(), image[:, :4].ravel(), image[:, -4:].ravel()])
        assert (margin == 1).all(), f"{path.name}: something runs over the edge"


def test_same_records_same_bytes(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.phase("prune", steps=40, batch=64, interval=20, log=10)
    run.masks(layers=2, heads=4, intermediate=16, hidden=8)
    run.metrics.close()
    for name in ("a", "b"):
        plot_run(tmp_path, tmp_path / name)
    for name in ALL:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_many_domains_with_long_names_stay_within_the_picture(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", extra_domains=9)
    run.domains = tuple(f"{name}-with-a-long-name" for name in run.domains)
    run.phase("prune", steps=400, batch=64, interval=50, log=10)
    run.metrics.close()
    for path in plot_run(tmp_path / "run"):
        assert (pixels(path)[:, -4:] == 1).all(), f"{path.name}: a label runs over the edge"


def test_default_output_and_a_run_that_just_began(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.phase("pretrain", steps=100, batch=64, interval=100, log=100)
    run.metrics.close()
    expected = ("epochs.png", "losses.png", "training.png", "weights.png")
    assert sorted(plot_run(tmp_path)) == [tmp_path / "plots" / name for name in expected]


def test_masks_alone(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False, wandb_project=None, run_name="test") as metrics:
        metrics.write_masks({"hidden": np.linspace(0, 1, 16)})
    assert [path.name for path in plot_run(tmp_path)] == ["masks.png"]


def test_nothing_to_draw_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder of a run that has trained"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="nothing to draw yet"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="a record without 'phase'"):
        plot_run(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_masks_that_would_run_code_or_are_damaged_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.npz"
    np.savez(path, hidden=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(DataError, match=r"masks\.npz: not a file of masks"):
        read_masks(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=r"masks\.npz: not a file of masks"):
        read_masks(path)


def test_no_torch_and_no_window_system() -> None:
    code = (
        "import sys, megashear.plots.run_plots; "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'megatron', 'matplotlib.pyplot')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
