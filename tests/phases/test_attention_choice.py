"""Which attention serves a run: rank 0 measures, all ranks follow; the run folder keeps it, a resumed run repeats it.

On CPUs, whose clock decides here too; the times are made up, and each rank's fall out differently.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers.jobs import world_kept
from helpers.ranks import LiveRanks
from helpers.tiny import Tiny
from megashear import ops
from megashear.config.load import load_config
from megashear.config.schema import ParallelConfig
from megashear.engine.collectives import gather_objects
from megashear.engine.layout import distributed
from megashear.errors import CheckpointError
from megashear.ops.kernels import attention_backend as attention_choice
from megashear.phases.attention_choice import CHOICES, choose_attention_backend
from megashear.phases.run_folder import open_context
from megashear.processes import StopRequest


def settled(file: Path, fastest: str) -> list[str]:
    """What every rank's attention is served by, where rank 0's clock finds `fastest` and the others another."""
    with distributed(ParallelConfig()) as layout:
        context = open_context(load_config(file), layout, StopRequest())
        own = fastest if layout.is_main else "plain"
        choice = attention_choice.Choice(own, {own: 1.0, "reference": 2.0}, {own: 0.0})
        with (
            patch.object(attention_choice, "MEASURED", ("cpu",)),
            patch.object(attention_choice, "_CHOICES", {}),
            patch.object(attention_choice, "measure", lambda shape, sample: choice),
        ):
            choose_attention_backend(context, context.source_shape, 2, masked=True)
            q = torch.zeros(2, 4, context.config.data.sequence_length, context.source_shape.head_dim)
            lines = ops.attention_choices()
            assert len(lines) == (attention_choice.forced() is None)
            return gather_objects(attention_choice.serving(q, q, None, None))


def settled_on_ranks(file: str, fastest: str) -> list[str]:
    """The same, called on live ranks."""
    with world_kept():
        return settled(Path(file), fastest)


def test_ranks_follow_the_first_and_a_resumed_run_the_record(ranks: LiveRanks, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = tiny.file(folder)
    served = ranks(2).call("phases.test_attention_choice:settled_on_ranks", file=str(file), fastest="wgmma")
    assert served == ["wgmma", "wgmma"]
    (key,) = json.loads((folder / CHOICES).read_text())
    assert "float32" in key and "head size" in key
    assert settled(file, "reference") == ["wgmma"]  # the clock has changed its mind, the run has not


def test_a_wish_of_the_environment_is_not_recorded(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    file = tiny.file(tmp_path / "run")
    monkeypatch.setenv("MEGASHEAR_ATTENTION", "compiled")
    assert settled(file, "wgmma") == ["compiled"]
    assert not (tmp_path / "run" / CHOICES).exists()


def test_a_damaged_record_is_named(tiny: Tiny, tmp_path: Path) -> None:
    file = tiny.file(tmp_path / "run")
    assert settled(file, "wgmma") == ["wgmma"]
    path = tmp_path / "run" / CHOICES
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), 7)))
    with pytest.raises(CheckpointError, match=r"attention\.json"):
        settled(file, "wgmma")
