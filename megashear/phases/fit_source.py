"""Source with output matrices fitted for one-shot pruning: the model folder `fitted` of a run.

It has the source's shape and is pruned like the source. It is computed once per set of kept units, again if it is lost,
and removed after finalize.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megashear.config.resolve import refit_batches
from megashear.engine.collectives import on_main, sum_over_world
from megashear.errors import ModelError, TrainingError
from megashear.hf.model_folder import ModelFolder
from megashear.importance.least_squares_fit import refit
from megashear.masks.mask_specs import mask_specs
from megashear.masks.mask_values import Masks
from megashear.masks.unit_scores import Scores, open_units
from megashear.model.micro_batch import MicroBatch, local_rows, micro_batches
from megashear.model.weight_io import write_model
from megashear.phases.calibration import NONFINITE_ADVICE, build_source, calibration_progress, calibration_text
from megashear.phases.rotate_source import principal, pruning_folder
from megashear.phases.run_folder import Context

FITTED_FOLDER = "fitted"


def fitted_folder(context: Context) -> ModelFolder:
    """Model folder that one-shot pruning cuts: the source, rotated and fitted as configured."""
    return context.open_model(FITTED_FOLDER) if refit_batches(context.config.prune) else pruning_folder(context)


def fit_source(context: Context, scores: Scores) -> None:
    """Write the model folder `fitted` for the units that the scores keep, unless it exists or is not configured.

    Call it on every rank.

    Raises:
        Interrupted: A stop was requested.
        TrainingError: Activations are not finite.
    """
    prune, layout = context.config.prune, context.layout
    if not refit_batches(prune):
        return
    assert context.target_shape is not None
    specs = mask_specs(context.source_shape, context.target_shape, prune.granularities)
    masks = open_units(scores.units, specs, context.source_shape, principal(context)).to(layout.device)
    fitted_for = {"fitted": refit_batches(prune), "kept": digest_of(masks)}
    if on_main(layout, lambda: is_there(context.model_folder(FITTED_FOLDER), fitted_for)):
        return
    folder = pruning_folder(context)
    parallel = replace(context.config.parallel, sequence=False)
    source, pruned = (build_source(context, folder, parallel) for _ in range(2))
    each = calibration_progress(context, "refit", context.source_shape.num_layers, "layer")
    refit(source, pruned, layout, masks, refit_text(context), each)
    damaged = sum(int((~value.isfinite()).sum()) for chunk in pruned for value in chunk.parameters())
    if bool(sum_over_world(torch.tensor(damaged, device=layout.device))):
        raise TrainingError(f"refit: fitted output matrices are not finite; {NONFINITE_ADVICE}, or prune.refit: 0")
    write_model(
        list(pruned),
        context.source_shape,
        context.dtype,
        context.model_folder(FITTED_FOLDER),
        layout,
        context.hf_config(),
        context.tokenizer_and_license_files(),
        fitted_for,
    )


def is_there(folder: Path, fitted_for: dict[str, Any]) -> bool:
    """Whether the folder exists and was fitted for the same kept units."""
    try:
        return ModelFolder.open(folder).provenance == fitted_for
    except ModelError:
        return False


def digest_of(masks: Masks) -> str:
    """Digest of the units that masks keep."""
    found = hashlib.sha256()
    for name, mask in masks.arrays().items():
        found.update(name.encode() + np.packbits(mask != 0).tobytes())
    return found.hexdigest()


def refit_text(context: Context) -> list[MicroBatch]:
    """This rank's sequences of the calibration text, from its beginning."""
    loader, layout = calibration_text(context), context.layout
    size = context.config.prune.batch.global_batch
    rows = local_rows(size, layout, 1).numpy()
    found = []
    for _ in range(refit_batches(context.config.prune)):
        samples, _ = loader.read(loader.stream.next_batch(size), rows)
        found += micro_batches(samples, layout, 1, layout.device, loader.separator)
    return found
