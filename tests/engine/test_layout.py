"""Stages partition the layers, and a world that does not fit a layout is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.schema import ParallelConfig
from megashear.engine.layout import Layout, build_layout, distributed, stage_layers
from megashear.errors import ConfigError, PeerError


def layout(pipeline: int = 1, virtual: int = 1, stage: int = 0) -> Layout:
    return Layout(1, 0, pipeline, stage, virtual, 1, 0, False, pipeline, stage, torch.device("cpu"))


@settings(deadline=None)
@given(pipeline=st.integers(1, 8), virtual=st.integers(1, 4), layers=st.integers(1, 80))
def test_stages_partition_the_layers_in_order(pipeline: int, virtual: int, layers: int) -> None:
    ranges = [
        stage_layers(layers, layout(pipeline, virtual, stage), chunk)
        for chunk in range(virtual)  # data passes all stages with their chunk 0, then all with their chunk 1
        for stage in range(pipeline)
    ]
    assert [index for one in ranges for index in one] == list(range(layers))
    sizes = [len(one) for one in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_first_and_last_stage() -> None:
    ends = [(layout(3, stage=s).is_first_stage, layout(3, stage=s).is_last_stage) for s in range(3)]
    assert ends == [(True, False), (False, False), (False, True)]
    assert layout().is_first_stage and layout().is_last_stage


def test_indivisible_world_size_is_refused() -> None:
    with distributed(ParallelConfig()) as alone:
        assert (alone.world_size, alone.tensor_size, alone.is_main, alone.sequence) == (1, 1, True, False)
        with pytest.raises(ConfigError, match=r"tensor 2 x pipeline 3 = 6 does not divide the 1 launched"):
            build_layout(ParallelConfig(tensor=2, pipeline=3))


def test_sequence_parallelism_is_off_on_one_rank() -> None:
    with distributed(ParallelConfig(sequence=True)) as alone:
        assert not alone.sequence
    assert not torch.distributed.is_initialized()


def test_peer_failure_differs_from_local_error() -> None:
    """A rank that is killed under gloo: `tests/faults/test_killed_rank.py`."""
    nccl = torch.distributed.DistBackendError("NCCL error: remote process exited. Last error:\nsocket closed")
    words = r"for 7 minutes \(NCCL error: remote process exited\)"
    with pytest.raises(PeerError, match=words), distributed(ParallelConfig(), timeout_minutes=7):
        raise nccl
    with pytest.raises(RuntimeError, match="the shapes differ"), distributed(ParallelConfig()):
        raise RuntimeError("the shapes differ")
    assert not torch.distributed.is_initialized()


def test_new_layout_destroys_previous_groups() -> None:
    with distributed(ParallelConfig()):
        before = len(torch.distributed.distributed_c10d._world.pg_map)
        build_layout(ParallelConfig())
        assert len(torch.distributed.distributed_c10d._world.pg_map) == before
