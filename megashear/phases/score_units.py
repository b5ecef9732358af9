"""Score the source's units for a run, once, and keep the scores in `importance.safetensors`.

An existing file is used if it was made from the same source, dataset and keys. An interrupted calibration starts again.
"""

import json
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megashear.config.load import to_dict
from megashear.engine.collectives import on_main
from megashear.errors import CheckpointError, TrainingError
from megashear.importance.calibrate import calibrate
from megashear.importance.criteria import REGISTRY, magnitudes
from megashear.masks.mask_specs import mask_specs
from megashear.masks.unit_scores import Scores, load_scores, near_cut, not_finite, save_scores
from megashear.model.weight_io import TensorSource
from megashear.phases.calibration import (
    NONFINITE_ADVICE,
    build_source,
    calibration_progress,
    calibration_text,
    calibration_weights,
)
from megashear.phases.rotate_source import principal, pruning_source
from megashear.phases.run_folder import Context
from megashear.planning.calibration_cost import calibration_cost, criteria_of
from megashear.planning.text_table import table
from megashear.train.metrics import SCORES_NAME

USED_KEYS = ("criterion", "layer_criterion", "batches")
"""Keys of `prune.importance` that scores depend on."""


def importance_scores(context: Context) -> Scores | None:
    """Scores of the run, from its folder or computed now; None if `prune.importance.criterion` is null.

    Call it on every rank.

    Raises:
        Interrupted: A stop was requested.
        TrainingError: A score is not finite.
    """
    if context.config.prune.importance.criterion is None:
        return None
    path, wanted = context.folder / SCORES_NAME, made_by(context)
    if on_main(context.layout, lambda: path.exists() and load_scores(path)[1] == wanted):
        return load_scores(path)[0]
    started = time.monotonic()
    scores = compute_scores(context)
    check_finite(context, scores)
    on_main(context.layout, lambda: save_scores(path, scores, wanted))
    if context.layout.is_main:
        print(report(context, scores, time.monotonic() - started), flush=True)
    return scores


def check_finite(context: Context, scores: Scores) -> None:
    """Raise TrainingError if a score is not finite."""
    wrong = not_finite(scores)
    by_weights = [name for name in wrong if REGISTRY[scores.criteria[name]].measure is None]
    if by_weights:  # first: weights that are not finite leave nothing finite, and no text is to blame
        source = context.config.source.folder or "the source"
        raise TrainingError(
            f"importance: magnitudes of {', '.join(by_weights)} are not finite numbers, so weights of {source} are not "
            "either; import it again from a sound copy"
        )
    if wrong:
        raise TrainingError(f"importance: scores of {', '.join(wrong)} are not finite numbers; {NONFINITE_ADVICE}")


def read_scores(context: Context) -> Scores:
    """Read the scores that one-shot pruning used. Raises CheckpointError if they are missing or from other inputs."""
    path = context.folder / SCORES_NAME
    advice = f"restore it from a copy, or remove {context.folder}/prune and what there is of it to prune again"
    scores, found = on_main(context.layout, lambda: load_scores(path, advice))
    if found != made_by(context):
        raise CheckpointError(f"{path}: scores of another source, dataset or keys than this run's; {advice}")
    return scores


def made_by(context: Context) -> dict[str, Any]:
    """Everything that scores depend on, as JSON values; the layout is not part of it."""
    config = context.config
    known = {
        "importance": {name: getattr(config.prune.importance, name) for name in USED_KEYS},
        "principal": principal(context),
        "masking": config.prune.masking,
        "global_batch": config.prune.batch.global_batch,
        "data": {name: to_dict(config.data)[name] for name in ("sequence_length", "separate_documents")},
        "weights": calibration_weights(context),
        "seed": config.run.seed,
        "precision": config.precision,
        "data_digest": context.dataset.digest(),
        "source_digest": None if context.source is None else context.source.digest(),
    }
    record: dict[str, Any] = json.loads(json.dumps(known))
    return record


def calibration_record(context: Context) -> dict[str, Any]:
    """Fields about calibration in the record of a phase: tokens read by basis, scores and fit, and their FLOPs."""
    config, target = context.config, context.target_shape
    assert target is not None
    length, precision = config.data.sequence_length, config.precision
    cost = calibration_cost(config.prune, context.source_shape, target, length, principal(context), precision)
    return {"calibration_tokens": cost.tokens, "calibration_flops": cost.flops}


def compute_scores(context: Context) -> Scores:
    """Compute scores by the configured criteria; equal on every rank."""
    config, shape = context.config, context.source_shape
    source = pruning_source(context)
    criteria = criteria_of(config.prune.importance, shape)
    by_weights = [name for name, one in criteria.items() if REGISTRY[one].measure is None]
    scores = Scores({}, {}, criteria)
    if len(by_weights) < len(criteria):
        on_text = {name: one for name, one in criteria.items() if name not in by_weights}
        scores = replace(_calibrated(context, source, on_text), criteria=criteria)
    if by_weights:
        norms: dict[str, Tensor] = on_main(context.layout, lambda: magnitudes(source, shape))
        for name in by_weights:
            scores.units[name] = norms[name].float()
            scores.errors[name] = torch.zeros_like(scores.units[name])
    return scores


def _calibrated(context: Context, source: TensorSource, criteria: dict[str, str]) -> Scores:
    prune = context.config.prune
    chunks, loader = build_source(context, source), calibration_text(context)
    batches, used = prune.importance.batches, ", ".join(dict.fromkeys(criteria.values()))
    each = calibration_progress(context, f"importance: {used}", batches)
    return calibrate(chunks, context.layout, loader, batches, prune.batch.global_batch, criteria, each)


def report(context: Context, scores: Scores, seconds: float) -> str:
    """Table of the granularities that shrink: criterion, units, scores, errors, units within the noise."""
    assert context.target_shape is not None
    specs = mask_specs(context.source_shape, context.target_shape, context.config.prune.granularities)
    header = ["", "criterion", "rows", "units", "kept", "median score", "median error", "within an error of the cut"]
    rows = []
    for spec in specs:
        score, error = scores.units[spec.name], scores.errors[spec.name]
        sizes = [str(spec.rows), str(spec.units), str(spec.target_units), f"{float(score.median()):.3g}"]
        noise = ["-", "-"]
        if REGISTRY[scores.criteria[spec.name]].measure is not None:
            noise = [f"{float(error.median()):.2g}", f"{near_cut(scores, spec)} of {score.numel()}"]
        rows.append([spec.name, scores.criteria[spec.name], *sizes, *noise])
    drawn = ", ".join(f"{name} {count}" for name, count in scores.samples.items() if count)
    title = f"Importance ({seconds:.1f} s" + (f"; sequences: {drawn})" if drawn else ")")
    return table(title, header, rows)
