"""`megashear env`: what it lists is what is there."""

import sys

import torch

from megashear.engine.environment import apex, describe, installed


def test_versions_and_device_are_those_of_this_process() -> None:
    rows = dict(describe())
    assert rows["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert rows["torch.distributed"] == ("nccl" if torch.cuda.is_available() else "gloo")
    assert rows["threads per rank"] == str(torch.get_num_threads())


def test_what_is_missing_is_said() -> None:
    assert installed("no-such-package-at-all") == "not installed"


def test_apex_is_known_by_its_modules(monkeypatch, tmp_path) -> None:
    assert apex() == "not installed"
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex() == "not installed"
    (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex() == "installed"
