"""Run the phases of a run file in order (`megashear run`).

A finished phase is recognised by its record, an interrupted one resumes from its newest checkpoint.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megashear.config.load import save_config
from megashear.config.schema import Config
from megashear.engine.collectives import on_main
from megashear.engine.layout import Layout, distributed
from megashear.errors import CheckpointError, Interrupted
from megashear.files.lock import run_lock
from megashear.phases.export import outdated, run_export
from megashear.phases.finalize import drop_sources, run_finalize
from megashear.phases.moments import drop_moments
from megashear.phases.one_shot import run_one_shot
from megashear.phases.run_folder import Context, open_context
from megashear.phases.summary import conclude
from megashear.phases.training import run_training
from megashear.planning.check import check
from megashear.planning.plan_tables import render
from megashear.processes import StopRequest
from megashear.train.callbacks import stop_requested
from megashear.train.training_phase import Callback


def run_prune(context: Context) -> None:
    """Run the phase `prune` by its method: learned masks or one-shot."""
    if context.config.prune.method == "one_shot":
        run_one_shot(context)
    else:
        run_training(context, "prune")


PHASES: dict[str, Callable[[Context], None]] = {
    "prune": run_prune,
    "finalize": run_finalize,
    "pretrain": lambda context: run_training(context, "pretrain"),
    "export": run_export,
}
LEFTOVERS: dict[str, Callable[[Context], None]] = {"finalize": drop_sources, "pretrain": drop_moments}
"""What a phase removes after its record is written, where it may have been killed in between."""


def run(
    config: Config,
    phases: list[str] | None = None,
    stop: StopRequest | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run the phases of `config.run.phases` that are not finished. Call it on every rank.

    Args:
        config: Configuration from `load_config`.
        phases: Run only these phases of `config.run.phases`; None: all.
        stop: Request to stop, checked before every step and phase; None: never.
        callbacks: Called by the training loop after a step's records are written, before evaluation and checkpoint.

    Raises:
        Interrupted: The run was stopped; it can be resumed.
        MegashearError: Any other error of `megashear.errors`.
    """
    logging.basicConfig(level=logging.WARNING, format="megashear: %(levelname)s: %(message)s")
    with distributed(config.parallel) as layout, locked(Path(config.run.folder), layout):
        if not layout.is_main:  # what is warned of, every rank finds; one says it
            logging.getLogger("megashear").setLevel(logging.ERROR)
        context = open_context(config, layout, stop or StopRequest(), callbacks)
        report = check(config, None if context.source is None else context.source_shape, layout.world_size)
        if layout.is_main:
            print(render(config, report), flush=True)
        on_main(layout, lambda: save_config(config, context.folder / "config.yaml"))
        for phase in config.run.phases:
            if phases is None or phase in phases:
                run_phase(context, phase)
        conclude(context)


def run_phase(context: Context, phase: str) -> None:
    """Run a phase unless it is finished.

    Raises:
        Interrupted: A stop was requested before the phase.
        CheckpointError: Pre-training, which follows this phase, is already finished.
    """
    if context.done(phase) is not None and not (phase == "export" and outdated(context)):
        if phase in LEFTOVERS:
            LEFTOVERS[phase](context)
        if context.layout.is_main:
            print(f"{phase}: already done, skipping", flush=True)
        return
    if phase in ("prune", "finalize") and context.done("pretrain") is not None:
        raise CheckpointError(
            f"{context.folder}: pre-training is done, of another model than {phase} would make now; choose another "
            f"run.folder, or remove {context.folder}/pretrain and {context.model_folder('final')} to train again"
        )
    if stop_requested(context.stop, context.layout):
        raise Interrupted(f"interrupted by a signal before {phase}. Rerun the same command to resume")
    PHASES[phase](context)


@contextmanager
def locked(folder: Path, layout: Layout) -> Iterator[None]:
    """Hold the run folder's lock on rank 0, for all ranks. Raises BusyError on every rank."""
    with ExitStack() as stack:
        on_main(layout, lambda: stack.enter_context(run_lock(folder)))
        yield
