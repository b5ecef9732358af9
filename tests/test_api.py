"""The public functions of `import megashear`."""

import subprocess
import sys
from pathlib import Path

import pytest

import megashear
from helpers.tiny import Tiny
from megashear.errors import ConfigError


def test_import_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, megashear; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_names_are_importable_and_documented() -> None:
    for name in megashear.__all__:
        assert getattr(megashear, name).__doc__, name
        assert name in dir(megashear)


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = megashear.missing


def test_import_evaluate_and_export_a_model(tiny: Tiny, tmp_path: Path) -> None:
    megashear.import_model(tiny.source, tmp_path / "model")
    dataset = megashear.Dataset.open(tiny.data)
    from megashear.evaluation.evaluate_model import HeldOutChoice

    losses = megashear.evaluate(tmp_path / "model", tiny.data, HeldOutChoice(32, 4))
    assert list(losses) == list(dataset.domains)
    assert all(5.0 < loss < 8.0 for loss, _ in losses.values())  # random weights: near ln 400
    megashear.export_model(tmp_path / "model", tmp_path / "export", "fp32")
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_load_config_reports_unknown_keys(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {folder: runs/a}\nprun: {}\n")
    with pytest.raises(ConfigError, match="prun"):
        megashear.load_config(tmp_path / "run.yaml", [])
