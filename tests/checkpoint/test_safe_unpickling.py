"""Metadata of a checkpoint is read without running anything."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megashear.checkpoint.checkpoint_store import list_checkpoints
from megashear.checkpoint.safe_unpickling import ALLOWED, refuse_foreign_pickles
from megashear.errors import CheckpointError


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_metadata_of_a_real_checkpoint_passes(unbroken_folder: Path) -> None:
    for phase in ("prune", "pretrain"):
        for path in list_checkpoints(unbroken_folder / phase):
            assert (path / "weights/.metadata").is_file()
            refuse_foreign_pickles(path)


def nested(path: Path) -> bytes:
    """torch's own loader of storages, which unpickles what it is given."""
    inner = path.with_name("inner")
    torch.save(Calls(os.mkdir, str(path)), inner)
    return pickle.dumps(Calls(torch.storage._load_from_bytes, inner.read_bytes()))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: pickle.dumps(Calls(os.mkdir, str(path))),
        lambda path: pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(path)!r})")),
        lambda path: pickle.dumps(Calls(getattr, "text", "format")),
        nested,
        # A dotted name that begins in an allowed module and walks out of it.
        lambda path: (
            b"\x80\x04\x8c\x28torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93\x8c"
            + bytes([len(str(path))])
            + str(path).encode()
            + b"\x85R."
        ),
        # What torch would unpickle from the data files, without a check.
        lambda path: pickle.dumps(Metadata({"embedding.weight": BytesStorageMetadata()})),
    ],
)
def test_names_that_act_are_refused(tmp_path: Path, make: Any) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/.metadata").write_bytes(make(canary))
    with pytest.raises(CheckpointError, match=r"which could run code|damaged"):
        refuse_foreign_pickles(tmp_path)
    assert not canary.exists()


def test_what_is_no_pickle(tmp_path: Path) -> None:
    for content in (b"", b"\x80", b"text", b"\x80\x04."):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{tmp_path}/.metadata: damaged"):
            refuse_foreign_pickles(tmp_path)


def test_allowed_names_are_plain_data() -> None:
    """Classes, dtypes and one look-up of a layout by name; nothing that opens, imports or calls."""
    for module, names in ALLOWED.items():
        for name in names:
            found = getattr(__import__(module, fromlist=[name]), name)
            assert isinstance(found, type | torch.dtype) or name == "_get_layout"
