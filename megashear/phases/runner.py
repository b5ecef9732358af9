"""`megashear run`: the phases of a run file, in order, each once.

Interrupted anywhere, the same command goes on: finished phases are known by their records, the one in progress by its
checkpoints. Read next: `context.py`.
"""

import logging
from collections.abc import Callable, Iterator
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
from megashear.train.loop import stop_requested
from megashear.train.training_phase import OnStep, do_nothing


def run_prune(context: Context) -> None:
    """The phase `prune` by its method: learned masks, or scores alone."""
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
    on_step: OnStep = do_nothing,
) -> None:
    """Walk through the phases of `config.run.phases` (only those in `phases`, if given) that are not done.

    Every rank calls it. stop: of `train/signals.py`, obeyed at the next step or between phases; None: never asked to.
    on_step: called with the `train.phase.Phase` on every rank after each training step's records are written, before
    the step's evaluation and checkpoint; what it raises ends the run.
    Raises the errors of `errors.py`; Interrupted after a stop was obeyed.
    """
    logging.basicConfig(level=logging.WARNING, format="megashear: %(levelname)s: %(message)s")
    with distributed(config.parallel) as layout, locked(Path(config.run.folder), layout):
        if not layout.is_main:  # what is warned of, every rank finds; one says it
            logging.getLogger("megashear").setLevel(logging.ERROR)
        context = open_context(config, layout, stop or StopRequest(), on_step)
        report = check(config, None if context.source is None else context.source_shape, layout.world_size)
        if layout.is_main:
            print(render(config, report), flush=True)
        on_main(layout, lambda: save_config(config, context.folder / "config.yaml"))
        for phase in config.run.phases:
            if phases is None or phase in phases:
                run_phase(context, phase)
        conclude(context)


def run_phase(context: Context, phase: str) -> None:
    """Run a phase unless it is done. Raises Interrupted where a stop was asked for before it, CheckpointError where
    pre-training, which it would come before, is done.
    """
    if context.done(phase) is not None and not (phase == "export" and outdated(context)):
        if phase in LEFTOVERS:
            LEFTOVERS[phase](context)
        if context.layout.is_main:
            print(f"{phase}: done before", flush=True)
        return
    if phase in ("prune", "finalize") and context.done("pretrain") is not None:
        raise CheckpointError(
            f"{context.folder}: pre-training is done, of another model than {phase} would make now; choose another "
            f"run.folder, or remove {context.folder}/pretrain and {context.model_folder('final')} to train again"
        )
    if stop_requested(context.stop, context.layout):
        raise Interrupted(f"stopped by a signal before {phase}; run the same command to go on")
    PHASES[phase](context)


@contextmanager
def locked(folder: Path, layout: Layout) -> Iterator[None]:
    """Hold the run folder's lock on rank 0, for all ranks. Raises BusyError on every rank."""
    with ExitStack() as stack:
        on_main(layout, lambda: stack.enter_context(run_lock(folder)))
        yield
