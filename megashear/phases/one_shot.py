"""One-shot pruning (`prune.method: one_shot`): score the units, train nothing; finalize prunes by scores.

Output matrices of the kept units are first fitted to the source (`prune.refit`).
"""

import time
from typing import Any

from megashear.config.resolve import refit_batches
from megashear.phases.calibration import build_source, calibration_weights
from megashear.phases.fit_source import fit_source
from megashear.phases.rotate_source import principal, pruning_source
from megashear.phases.run_folder import Context
from megashear.phases.score_units import calibration_record, importance_scores
from megashear.phases.source_losses import source_losses


def run_one_shot(context: Context) -> None:
    """Score the units and record the phase as finished. Raises the errors of `importance_scores`."""
    started, evaluated = time.monotonic(), context.evaluation_seconds
    assert context.source is not None
    scores = importance_scores(context)
    assert scores is not None
    fit_source(context, scores)
    batch = context.config.prune.batch
    source_losses(context, "prune", build_source(context, pruning_source(context)), batch.micro_batch, None)
    record: dict[str, Any] = {
        "name": "prune",
        "method": "one_shot",
        "principal": principal(context),
        "refit": refit_batches(context.config.prune),
        "criteria": scores.criteria,
        "steps": 0,
        "tokens": 0,
        **calibration_record(context),
        "skipped": 0,
        "weights": calibration_weights(context),
        "epochs": dict.fromkeys(context.dataset.domains, 0.0),
    }
    evaluating = context.evaluation_seconds - evaluated
    context.finish("prune", record | {"seconds": time.monotonic() - started, "evaluation_seconds": evaluating})
