"""Runs and command lines on the ranks of `ranks.Ranks`, whose process group stays up when a run would take it down."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from helpers.tiny import break_off, finish, send_signal
from megashear import cli
from megashear.config.load import load_config


@contextlib.contextmanager
def world_kept() -> Iterator[None]:
    """Let `megashear.engine.layout.distributed` take down its own groups, but not the world."""
    destroy = dist.destroy_process_group

    def destroy_group(group: Any = None) -> None:
        if group is not None and group is not dist.group.WORLD:
            destroy(group)

    with patch.object(dist, "destroy_process_group", destroy_group):
        yield


def signal_the_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        send_signal()


def run_all(jobs: list[dict[str, Any]]) -> None:
    """Run jobs one after another: {"file": run file, "overrides": [...], "stop": [[phase, step], ...], "finish": bool}.

    A stop is a signal to the last rank only, and all ranks must stop.
    """
    with world_kept():
        for job in jobs:
            config = load_config(Path(job["file"]), job["overrides"])
            for phase, step in job["stop"]:
                assert break_off(config, (phase, step), signal_the_last_rank)
            if job["finish"]:
                finish(config)


def command(arguments: list[str], folder: str = ".") -> dict[str, Any]:
    """Run `megashear ARGUMENTS` in a folder on every rank; returns rank 0's exit code and output."""
    output, errors = io.StringIO(), io.StringIO()
    with world_kept(), contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = cli.main(arguments)
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}


def job(file: Path, *overrides: str, stop: list[tuple[str, int]] | None = None, finish: bool = True) -> dict[str, Any]:
    """One job of `run_all`, for the caller's side."""
    return {"file": str(file), "overrides": list(overrides), "stop": stop or [], "finish": finish}
