"""Finalize phase: fold the masks into a plain dense LLaMA, and prove that it computes the same.

Reads the model folder `masked` and the masks of pruning's last checkpoint (after one-shot pruning: the source and its
scores), folds tensor by tensor, and writes the model folder `pruned` in fp32, so that folding does not round. Both
models then run on held-out text, and their logits must agree.
"""

import shutil
from dataclasses import dataclass
from typing import Any

import torch

from megashear.checkpoint.checkpoint_store import newest_valid, read_masks, step_folder
from megashear.config.model_shape import ModelShape
from megashear.engine.collectives import on_main
from megashear.errors import CheckpointError, ModelError
from megashear.evaluation.heldout import evaluate_sequences
from megashear.evaluation.losses import save_sequences, summarise
from megashear.files.atomic import atomic_folder
from megashear.hf.finish_folder import seal_folder, write_settings
from megashear.hf.model_folder import ModelFolder
from megashear.masks.fold import Folding
from megashear.masks.hard_concrete_masks import HardConcreteMasks
from megashear.masks.kept_units import Borderline, KeptUnits, borderline_units, kept_units_of
from megashear.masks.mask_optimizer import build_mask_optimizer
from megashear.masks.mask_specs import mask_specs
from megashear.masks.mask_values import Masks
from megashear.masks.unit_scores import open_units
from megashear.phases.fit_source import FITTED_FOLDER, fit_source, fitted_folder
from megashear.phases.moments import fold_moments, write_folded
from megashear.phases.proof import EXACT_TOLERANCE, TOLERANCE, Proof, prove
from megashear.phases.rotate_source import PRINCIPAL_FOLDER, principal
from megashear.phases.run_folder import Context
from megashear.phases.score_units import read_scores
from megashear.phases.source_losses import open_heldout
from megashear.phases.training import loss_record
from megashear.train.metrics import save_masks


def run_finalize(context: Context) -> None:
    """Write the model folder `pruned`, prove that it is equal, and record kept units and borderline masks."""
    cut = load_pruning_result(context)
    folder = context.model_folder("pruned")
    fold = Folding(context.source_shape, cut.keep, cut.masks.to("cpu"), context.config.prune.masking)
    on_main(context.layout, lambda: fold_folder(context, cut, fold))
    on_main(context.layout, lambda: fold_moments(context, cut.keep))
    heldout = open_heldout(context, context.config.prune.batch.eval_sequences)
    assert context.target_shape is not None
    proof, pruned = prove(context, cut.masked, fold, ModelFolder.open(folder), heldout)
    if not proof.holds:
        on_main(context.layout, lambda: shutil.rmtree(folder))
        raise ModelError(failure(context, proof))
    losses = evaluate_sequences(heldout, context.layout, pruned, context.config.prune.batch.micro_batch)
    record: dict[str, Any] = {
        "name": "finalize",
        "logit_difference": proof.difference,
        "exact_difference": proof.exact,
        "kept": kept_units(cut.keep, context.source_shape),
        "borderline": [vars(one) for one in cut.borderline],
        **loss_record(summarise(losses)),
    }
    on_main(context.layout, lambda: save_masks(context.folder, cut.masks.arrays()))
    on_main(context.layout, lambda: save_sequences(context.folder / "finalize", losses, heldout.digests()))
    if context.layout.is_main:
        print(report(record), flush=True)
    context.finish("finalize", record)
    drop_sources(context)


def kept_units(keep: KeptUnits, source: ModelShape) -> dict[str, int]:
    """Count the units of the pruned model by granularity; `query` only with several query heads per group.

    Units of dropped layers, and queries of dropped groups, are not counted.
    """
    layers = keep.layer.numel()
    kept = {"hidden": keep.hidden.numel(), "layer": layers, "group": layers * keep.group.shape[1]}
    if source.queries_per_group > 1:
        kept["query"] = layers * keep.head.shape[1]
    return kept | {"head": layers * keep.head.shape[1], "intermediate": layers * keep.intermediate.shape[1]}


def drop_sources(context: Context) -> None:
    """Remove the rotated and the fitted source, which are not read after finalize."""

    def drop() -> None:
        for name in (PRINCIPAL_FOLDER, FITTED_FOLDER):
            shutil.rmtree(context.model_folder(name), ignore_errors=True)

    on_main(context.layout, drop)


@dataclass(frozen=True)
class Cut:
    """Result of pruning: the model to fold, the kept units, and masks under which it computes the same."""

    masked: ModelFolder
    keep: KeptUnits
    masks: Masks
    """On the run's device, open exactly where `keep` keeps; after one-shot pruning exactly 1 there."""
    borderline: list[Borderline]
    provenance: dict[str, Any]


def load_pruning_result(context: Context) -> Cut:
    """Load the result of pruning. Raises CheckpointError if pruning is not finished or files are missing."""
    record = context.done("prune")
    if record is None:
        raise CheckpointError(f"{context.folder}: pruning is not finished; run `megashear prune` (or `run`) first")
    shape = context.source_shape
    if context.config.prune.method == "one_shot":
        assert context.target_shape is not None
        found = read_scores(context)
        fit_source(context, found)  # where the folder was lost, or is of another cut
        scores = found.units
        specs = mask_specs(shape, context.target_shape, context.config.prune.granularities)
        masks = open_units(scores, specs, shape, principal(context)).to(context.layout.device)
        keep = kept_units_of(scores, specs, shape)
        return Cut(fitted_folder(context), keep, masks, [], context.provenance([record]))
    learned = load_masks(context)
    keep = kept_units_of(learned.log_alpha, learned.specs, shape)
    borderline = borderline_units(learned.log_alpha, learned.specs)
    masked = context.open_model("masked")
    return Cut(masked, keep, learned.deterministic("target"), borderline, masked.provenance)


def load_masks(context: Context) -> HardConcreteMasks:
    """Load the masks at the end of pruning. Raises CheckpointError if they are missing."""
    config, layout = context.config, context.layout
    path = on_main(layout, lambda: newest_valid(context.folder / "prune"))
    last = step_folder(context.folder / "prune", config.prune.batch.steps)
    if path != last:
        raise CheckpointError(
            f"{last}: missing or damaged; finalizing needs the masks of pruning's last step: restore it from a copy, "
            f"or remove {context.folder}/prune to prune again"
        )
    assert context.target_shape is not None
    optimizer = build_mask_optimizer(
        context.source_shape, context.target_shape, config.prune, config.run.seed, layout.device
    )
    optimizer.load_state_dict(read_masks(path))
    return optimizer.masks


def fold_folder(context: Context, cut: Cut, fold: Folding) -> None:
    """Write the model folder `pruned`, one tensor in memory at a time."""
    masked, target = cut.masked, context.target_shape
    assert target is not None
    shutil.rmtree(context.model_folder("pruned"), ignore_errors=True)
    with atomic_folder(context.model_folder("pruned")) as temporary:
        write_folded(temporary, masked, fold, context, torch.float32)
        write_settings(temporary, target, torch.float32, masked.config, masked.tokenizer_files + masked.companion_files)
        seal_folder(temporary, cut.provenance)


def report(record: dict[str, Any]) -> str:
    """Text that reports the result of finalize."""
    lines = [f"finalize: pruned and masked logits agree within {record['logit_difference']:.1e} of the largest logit"]
    if record["exact_difference"] is not None:
        lines.append(f"  this model amplifies rounding; in fp64 they agree within {record['exact_difference']:.1e}")
    for one in record["borderline"]:
        lines.append(
            f"  {one['granularity']:<12} {one['kept']:>7} units kept, {one['below_half']:>5} borderline "
            f"(mask below 0.5), lowest {one['worst']:.4f}"
        )
    return "\n".join(lines)


def failure(context: Context, proof: Proof) -> str:
    """Error message for a pruned model that differs from the masked one."""
    return (
        f"{context.model_folder('pruned')}: the pruned model's logits differ from the masked model's by "
        f"{proof.difference:.1e} of the largest (at most {TOLERANCE:.0e}), and in fp64 by {proof.exact:.1e} (at most "
        f"{EXACT_TOLERANCE:.0e}); it was removed. This is a bug in megashear; please report it with "
        f"{context.folder}/identity.json"
    )
