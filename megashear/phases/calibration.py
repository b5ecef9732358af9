"""Calibration text of a run, the source model that reads it, and progress of the calibration."""

import time
from collections.abc import Callable

from megashear.config.schema import ParallelConfig
from megashear.engine.parallel import transformer_config
from megashear.errors import Interrupted
from megashear.importance.calibrate import calibration_loader
from megashear.mixture.domain_weights import starting_weights
from megashear.mixture.loader import Loader
from megashear.model.llama import Llama
from megashear.model.weight_io import TensorSource, filled_chunks
from megashear.phases.run_folder import Context
from megashear.train.callbacks import stop_requested

NONFINITE_ADVICE = "check the source's held-out losses (`megashear eval SOURCE DATA`), or set precision: fp32"
"""What to do where something that was computed of the source is not a finite number."""
PROGRESS_SECONDS = 10.0
"""Seconds between lines of progress."""


def calibration_text(context: Context) -> Loader:
    """Loader of the run's calibration text, from its beginning."""
    data, weights = context.config.data, calibration_weights(context)
    seed, separate = context.config.run.seed, data.separate_documents
    return calibration_loader(context.dataset, weights, data.sequence_length, seed, separate)


def calibration_weights(context: Context) -> dict[str, float]:
    """Domain weights of the mixture at its start."""
    dataset = context.dataset
    tokens = {domain: len(dataset.stream(domain)) for domain in dataset.domains}
    return dict(zip(tokens, starting_weights(context.config.mixture, tokens).tolist(), strict=True))


def build_source(context: Context, source: TensorSource, parallel: ParallelConfig | None = None) -> list[Llama]:
    """Build this rank's chunks of the source in the run's precision, without optimizer and gradient buffers.

    Args:
        context: The run.
        source: Weights to load.
        parallel: Layout; None: the run's. It may differ from the run's in sequence parallelism only.
    """
    config, layout, shape = context.config, context.layout, context.source_shape
    core = transformer_config(shape, parallel or config.parallel, context.dtype)
    core.gradient_accumulation_fusion = False  # there is no buffer to add gradients to
    exact, recompute = config.prune.masking == "exact", config.parallel.recompute == "full"
    return filled_chunks(shape, core, layout, source, exact, recompute)


def calibration_progress(context: Context, what: str, total: int, unit: str = "batch") -> Callable[[int], None]:
    """Return a function that prints progress of calibration, and stops if requested. Call it on all ranks together.

    Args:
        context: The run.
        what: Name of what is computed.
        total: Number of units of work.
        unit: Name of a unit.

    Raises:
        Interrupted: A stop was requested (by the returned function).
    """
    printed_at = time.monotonic()

    def each(done: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if context.layout.is_main and (done == total or now - printed_at >= PROGRESS_SECONDS):
            printed_at = now
            print(f"{what}: {unit} {done} of {total}", flush=True)
        if done < total and stop_requested(context.stop, context.layout):
            raise Interrupted(
                "interrupted by a signal while calibrating. Rerun the same command to restart calibration"
            )

    return each
