"""Checkpoint store with digest verification.

A checkpoint is a folder `step-00000200`. All ranks write into a temporary folder (weights and optimizer by
megatron-core, masks as safetensors, the rest as JSON); it gets a manifest of digests and is renamed. A damaged
checkpoint is reported and skipped in favour of an older one. The newest `keep` valid ones are retained.
"""

import errno
import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch.distributed.checkpoint.api import CheckpointException

from megashear.checkpoint.safe_unpickling import refuse_foreign_pickles
from megashear.engine import sharded_checkpoint
from megashear.engine.collectives import barrier, gather_objects, on_main
from megashear.engine.layout import Layout
from megashear.engine.optimizer import WeightOptimizer
from megashear.errors import CheckpointError, StorageError
from megashear.files.atomic import publish_folder, storage_error, write_json
from megashear.files.file_digests import check_files, read_manifest, write_manifest
from megashear.masks.mask_optimizer import MaskOptimizer
from megashear.processes import hold_signals

WEIGHTS, MASKS, STATE = "weights", "masks.safetensors", "state.json"
TORCH_WRITER = "inline_container"
"""What the message of torch.save names where the file system refuses a write: it raises a bare RuntimeError."""

logger = logging.getLogger(__name__)


def step_folder(folder: Path, step: int) -> Path:
    """The checkpoint's folder of a step."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    weights: WeightOptimizer,
    masks: MaskOptimizer | None,
    state: dict[str, Any],
    layout: Layout,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` (every rank calls it) and remove older ones but for `keep` in all.

    state: JSON values. Raises StorageError on every rank where any of them could not write; older checkpoints are
    then untouched, and nothing of the new one stays.
    """
    path = step_folder(folder, step)

    def begin() -> Path:
        # A name of its own: a writer that outlived a killed run cannot write into it.
        temporary = folder / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            for left in folder.glob(".step-*"):  # by a run that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)
            (temporary / WEIGHTS).mkdir(parents=True)
        except OSError as error:
            raise storage_error(error, temporary) from error
        return temporary

    def finish() -> None:
        if masks is not None:
            _write_masks(masks, temporary / MASKS)
        write_json(temporary / STATE, state)
        write_manifest(temporary, {"step": step})
        try:
            publish_folder(temporary, path)
        except OSError as error:
            raise storage_error(error, path) from error
        # Later ones were found damaged when the phase was taken up; they are not what is worth keeping.
        for old in [one for one in list_checkpoints(folder) if one <= path][keep:]:
            shutil.rmtree(old, ignore_errors=True)

    temporary: Path = on_main(layout, begin)
    try:
        _write_weights(weights, temporary / WEIGHTS, path)
        on_main(layout, finish)
    except StorageError:
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def _write_masks(masks: MaskOptimizer, path: Path) -> None:
    tensors = {name: value.cpu().contiguous() for name, value in masks.state_dict().items()}
    try:
        path.write_bytes(save(tensors))
    except OSError as error:
        raise storage_error(error, path) from error


def _write_weights(weights: WeightOptimizer, folder: Path, path: Path) -> None:
    """Let all ranks write into `folder`, to become a part of `path`.

    Raises StorageError where one could not: on every rank, or on that one alone, which then ends and has its launcher
    end the others (they wait within megatron-core and cannot be told).
    """
    try:
        with hold_signals():
            sharded_checkpoint.save(weights, folder)
    except OSError as error:
        raise storage_error(error, path) from error
    except CheckpointException as error:  # on every rank at once; only one of them knows the reason
        reason = max(gather_objects(_reason(error)), key=len)
        raise _not_written(path, reason) from error
    except sharded_checkpoint.WRITE_ERRORS as error:
        raise _not_written(path, _reason(error)) from error
    except RuntimeError as error:
        if TORCH_WRITER not in str(error):
            raise
        raise _not_written(path, "torch.save could not write") from error


def _not_written(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"{path}: could not be written ({reason}); older checkpoints are unchanged; free space and run again"
    )


def _reason(error: BaseException) -> str:
    """The last line that says something: torch puts a traceback of every rank into its message, megatron-core the words
    of the process that wrote.
    """
    last = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    return "the disk is full" if any(f"[Errno {full}]" in last for full in (errno.ENOSPC, errno.EDQUOT)) else last


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a phase, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; older ones are tried, and said. None where there
    is none.

    Raises CheckpointError where there are checkpoints and every one of them is damaged.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            check_files(path, read_manifest(path, CheckpointError), CheckpointError)
            refuse_foreign_pickles(path)
            return path
        except CheckpointError as error:
            logger.warning("%s is damaged and left alone (%s)", path, error)
    if found:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged; restore one from a copy, or remove the folder to start the phase "
            "again"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def read_masks(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's masks, on the CPU; raises CheckpointError where it has none."""
    if not (path / MASKS).is_file():
        raise CheckpointError(f"{path}: holds no masks; it is not a checkpoint of the pruning phase")
    return load_file(path / MASKS)


def load_checkpoint(path: Path, weights: WeightOptimizer, masks: MaskOptimizer | None) -> dict[str, Any]:
    """Fill weights, optimizer and masks from a verified checkpoint (every rank calls it); returns its state."""
    sharded_checkpoint.load(weights, path / WEIGHTS)
    if masks is not None:
        masks.load_state_dict(read_masks(path))
    barrier()
    return read_state(path)
