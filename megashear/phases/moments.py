"""Carry Adam's moments from pruning into pre-training: written with the masked model, and pruned with it.

A fresh Adam must estimate gradient sizes again, and its first steps undo part of a short pruning phase. If masks are
frozen at 1, weights and gradients of kept units are unchanged by finalize, and so are their moments. Norm weights take
their gain at finalize in the principal basis; their moments stay, because Adam's step depends on the ratio of the two.
If the teacher stops between phases, gradients grow two- to sixfold, and the old moments are still the better start
(docs/results.md).

The files are model folders, so the layout may change between phases. Without them pre-training starts with fresh
moments. They are removed when pre-training is finished.
"""

import logging
import shutil
from pathlib import Path

import torch

from megashear.config.resolve import frozen_steps
from megashear.engine.collectives import on_main
from megashear.engine.optimizer import (
    MOMENTS,
    WeightOptimizer,
    count_steps,
    kept_weights,
    shown_moment,
    take_moment,
    unwrap,
)
from megashear.files.atomic import atomic_folder
from megashear.hf.finish_folder import seal_folder, write_settings
from megashear.hf.model_folder import ModelFolder
from megashear.hf.safetensors_writer import ShardedWriter
from megashear.hf.tensor_names import tensor_shapes
from megashear.masks.fold import Folding
from megashear.masks.kept_units import KeptUnits
from megashear.masks.mask_optimizer import MaskOptimizer
from megashear.masks.mask_values import Masks
from megashear.model.weight_io import load_weights, write_model
from megashear.phases.run_folder import Context

logger = logging.getLogger(__name__)
FOLDER = "moments"


def write_moments(context: Context, weights: WeightOptimizer, masks: MaskOptimizer) -> None:
    """Write the moments at the end of pruning, if pre-training uses them and masks are frozen."""
    config = context.config
    used_later = "pretrain" in config.run.phases and config.pretrain.moments == "pruned"
    if not used_later or not masks.schedule.is_frozen(config.prune.batch.steps):
        return
    folder, shape = context.folder / FOLDER, context.source_shape
    on_main(context.layout, lambda: shutil.rmtree(folder, ignore_errors=True))
    on_main(context.layout, folder.mkdir)
    for name in MOMENTS:
        with shown_moment(weights, name):
            path = folder / f"masked-{name}"
            write_model(weights.chunks, shape, context.dtype, path, context.layout, context.hf_config(), [], {})


def fold_moments(context: Context, keep: KeptUnits) -> None:
    """Fold the moments like the model (rank 0 only); does nothing if pruning wrote none."""
    assert context.target_shape is not None
    fold = Folding(context.source_shape, keep, Masks())
    for name in MOMENTS:
        path = context.folder / FOLDER / f"masked-{name}"
        if not path.exists():
            continue
        with atomic_folder(path.with_name(f"pruned-{name}")) as temporary:
            write_folded(temporary, ModelFolder.open(path, digests=True), fold, context, context.dtype)
            write_settings(temporary, context.target_shape, context.dtype, context.hf_config(), [])
            seal_folder(temporary, {})
        shutil.rmtree(path)


def write_folded(folder: Path, model: ModelFolder, fold: Folding, context: Context, dtype: torch.dtype) -> None:
    """Write the folded tensors of a model into `folder`, one tensor in memory at a time."""
    assert context.target_shape is not None
    with ShardedWriter.create(folder, tensor_shapes(context.target_shape), dtype) as writer:
        for name in tensor_shapes(context.source_shape):
            folded = fold(name, model.read(name).float())
            if folded is not None:
                writer.write(*folded)


def take_moments(context: Context, weights: WeightOptimizer) -> None:
    """Start pre-training's Adam with the pruned moments, if they exist; weights are not changed."""
    folder = context.folder / FOLDER
    paths = {name: folder / f"pruned-{name}" for name in MOMENTS}
    there = on_main(context.layout, lambda: all(path.exists() for path in paths.values()))
    if context.config.pretrain.moments != "pruned":
        return
    if not there:
        prune = context.config.prune
        if context.target_shape is not None and prune.method == "learned" and frozen_steps(prune):
            logger.warning("pretrain: Adam starts fresh: run.phases did not name pretrain while the run was pruned")
        return
    with kept_weights(weights):
        for name, path in paths.items():
            model = context.open_model(f"{FOLDER}/{path.name}")
            for chunk in weights.chunks:
                load_weights(unwrap(chunk), model)
            take_moment(weights, name)
    count_steps(weights, context.config.prune.batch.steps)
    if context.layout.is_main:
        print("pretrain: Adam starts with the moments of pruning", flush=True)


def drop_moments(context: Context) -> None:
    """Remove the files when pre-training is finished."""
    on_main(context.layout, lambda: shutil.rmtree(context.folder / FOLDER, ignore_errors=True))
