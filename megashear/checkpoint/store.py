"""Checkpoints of a stage: folders `step-00000200` that exist whole or not at all, the newest valid of which is taken
up.

A checkpoint is written into a temporary folder by all ranks (weights and optimizer by megatron-core, masks as
safetensors, the rest as JSON), gets a manifest of digests, and is renamed. Key properties: nothing that is damaged is
loaded, older ones are tried and said; `keep` newest are kept; nothing read runs code. Read next: `engine/sharded.py`,
`pickles.py`.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megashear.checkpoint.pickles import refuse_foreign_pickles
from megashear.engine import sharded
from megashear.engine.collectives import barrier, gather_objects, on_main
from megashear.engine.layout import Layout
from megashear.engine.optimizer import WeightOptimizer
from megashear.errors import CheckpointError, StorageError
from megashear.files.atomic import publish_folder, storage_error, write_json
from megashear.files.manifest import check_files, read_manifest, write_manifest
from megashear.masks.state import MaskState

WEIGHTS, MASKS, STATE = "weights", "masks.safetensors", "state.json"

logger = logging.getLogger(__name__)


def step_folder(folder: Path, step: int) -> Path:
    """The checkpoint's folder of a step."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    weights: WeightOptimizer,
    masks: MaskState | None,
    state: dict[str, Any],
    layout: Layout,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` (every rank calls it) and remove all but the `keep` newest.

    state: JSON values. Raises StorageError on every rank where any of them could not write; older checkpoints are
    then untouched.
    """
    path = step_folder(folder, step)
    temporary = folder / f".{path.name}.tmp"

    def begin() -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / WEIGHTS).mkdir(parents=True)
        except OSError as error:
            raise storage_error(error, temporary) from error

    def finish() -> None:
        try:
            if masks is not None:
                save_file(
                    {name: value.cpu().contiguous() for name, value in masks.state_dict().items()}, temporary / MASKS
                )
            write_json(temporary / STATE, state)
            write_manifest(temporary, {"step": step})
            publish_folder(temporary, path)
        except OSError as error:
            raise storage_error(error, path) from error
        for old in list_checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)

    on_main(layout, begin)
    _write_weights(weights, temporary / WEIGHTS)
    on_main(layout, finish)
    return path


def _write_weights(weights: WeightOptimizer, folder: Path) -> None:
    """Let all ranks write; where one fails, all of them raise its error."""
    failure: StorageError | None = None
    try:
        sharded.save(weights, folder)
    except OSError as error:
        failure = storage_error(error, folder)
    except sharded.WRITE_ERRORS as error:
        failure = StorageError(
            f"{folder}: could not be written ({error}); older checkpoints are unchanged; free space, "
            "run again"
        )
    failures = [one for one in gather_objects(failure) if one is not None]
    if failures:
        raise failures[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a stage, newest first."""
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
            f"{folder}: every checkpoint is damaged; restore one from a copy, or remove the folder to start the stage again"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def read_masks(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's masks, on the CPU; raises CheckpointError where it has none."""
    if not (path / MASKS).is_file():
        raise CheckpointError(f"{path}: holds no masks; it is not a checkpoint of the pruning stage")
    return load_file(path / MASKS)


def load_checkpoint(path: Path, weights: WeightOptimizer, masks: MaskState | None) -> dict[str, Any]:
    """Fill weights, optimizer and masks from a verified checkpoint (every rank calls it); returns its state."""
    sharded.load(weights, path / WEIGHTS)
    if masks is not None:
        masks.load_state_dict(read_masks(path))
    barrier()
    return read_state(path)
