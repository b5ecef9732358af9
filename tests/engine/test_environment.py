"""`megashear env`: what is reported is what is there."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

import megashear
from megashear.engine import environment


def test_reports_versions_and_roles() -> None:
    rows = environment.describe()
    names = [name for name, _ in rows]
    assert len(set(names)) == len(names)
    told = dict(rows)
    assert told["megashear"] == megashear.__version__
    assert told["torch"] == torch.__version__
    for name in ("megatron-core", "tokenizers", "sentencepiece"):
        assert told[name] == importlib.metadata.version(name)
    assert told["parallel linears"] == "megatron-core"
    assert told["backend of torch.distributed"] in ("gloo", "nccl")


def test_reports_cpu_with_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASHEAR_DEVICE", "cpu")
    told = dict(environment.describe())
    assert told["backend of torch.distributed"] == "gloo"
    assert told["gradient accumulation fusion"] == "none"
    assert told["device"].startswith("CPU")


def test_reports_adam_of_megatron() -> None:
    told = dict(environment.roles())
    if environment.importable("transformer_engine") is None and environment.importable("apex.optimizers") is None:
        assert told["Adam"] == "torch"
    else:
        assert told["Adam"] in ("Transformer Engine", "Apex")


def test_apex_is_detected_by_compiled_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of that name on PyPI has an `apex` module and none of NVIDIA's; a broken build counts as missing."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert dict(environment.versions())["NVIDIA Apex"] == "not installed"
    (tmp_path / "amp_C.py").write_text("raise ImportError('libcudart.so.11.0')")
    assert dict(environment.versions())["NVIDIA Apex"] == "not installed"
    (tmp_path / "amp_C.py").write_text("")
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    assert dict(environment.versions())["NVIDIA Apex"] == "amp_C"
