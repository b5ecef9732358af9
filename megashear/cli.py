"""Command line of megashear: one function per verb.

A user's error is one message on stderr and an exit code; tracebacks are printed for internal errors only. Verbs import
what they need when they run, so `--help` is fast and `check` does not load torch.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megashear import __version__
from megashear.errors import ConfigError, Interrupted, MegashearError, ModelError

if TYPE_CHECKING:
    from megashear.config.model_shape import ModelShape
    from megashear.config.schema import Config


INTERNAL_ERROR = 70  # sysexits' EX_SOFTWARE
KEYBOARD_INTERRUPT = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE

EXIT_CODES = """\
exit codes:
    0  success
    1  another error
    2  command line or run file: unknown keys, an impossible target, layout or schedule
    3  data: a dataset, shard or tokenizer cannot be used
    4  model: a weights folder is missing, unsafe or incomplete
    5  checkpoint: none is valid, or it belongs to another run
    6  training: losses stay non-finite, or a domain ran out
    7  storage: the disk is full or read-only
    8  busy: another process uses the run folder
    9  ranks: another rank failed or did not respond; see its message
   70  internal error (a bug in megashear; please report it with the traceback)
   75  interrupted by a signal after saving a checkpoint; rerun the same command to resume
  130  interrupted by Ctrl-C
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: Words after `megashear`; None: those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        options.act(options)
        sys.stdout.flush()
        return 0
    except MegashearError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return KEYBOARD_INTERRUPT
    except BrokenPipeError:  # the reader of our output went away; nothing more can be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception:
        traceback.print_exc()
        print("megashear: internal error; please report it with the traceback above", file=sys.stderr)
        return INTERNAL_ERROR


def _print_error(error: MegashearError) -> None:
    """Print a user's error once for all ranks.

    Rank 0 prints. Another rank leaves the message where torchrun looks for the first failure; without that place it
    prints too, because the error may be its own; only a stop that was asked for is everybody's.
    """
    rank = os.environ.get("RANK", "0")
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        # torchrun shows what stands for a traceback there, of the rank that failed first.
        details = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        content = {"message": {"message": str(error), "extraInfo": details}}
        Path(place).write_text(json.dumps(content), encoding="utf-8")
    if rank == "0" or not (place or isinstance(error, Interrupted)):
        who = "megashear" if rank == "0" else f"megashear (rank {rank})"
        print("\n".join(f"{who}: error: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megashear",
        description="Prune a LLaMA to a target shape, and continue its pre-training on a dynamic data mixture.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megashear {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, meaning: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        added.set_defaults(act=VERBS[name], verb=name)
        return added

    one = verb("import", "copy a Hugging Face LLaMA into a verified model folder")
    one.add_argument("source", type=Path, help="Hugging Face folder: config.json, tokenizer, safetensors")
    one.add_argument("output", type=Path, help="model folder to write")
    for name, meaning in (
        ("check", "check a run file without torch, weights or data; print shapes, layout, memory and tokens"),
        ("run", "run the phases of a run file, and resume where the run stopped"),
        ("prune", "run the pruning phase of a run file"),
        ("finalize", "run the finalize phase: fold the masks into a smaller model"),
        ("pretrain", "run the continued pre-training phase of a run file"),
    ):
        one = verb(name, meaning)
        one.add_argument("file", type=Path, nargs="?" if name == "check" else None, help="run file (YAML)")
        one.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys to override, such as run.seed=1")
        if name == "check":
            one.add_argument("--presets", action="store_true", help="list the named shapes")
        if name in ("run", "prune", "pretrain"):
            one.add_argument("--profile", action="store_true", help="trace steps 3 to 5 (logging.profile_steps=3)")
    one = verb("export", "write a Hugging Face folder from a model or run folder, and verify it")
    one.add_argument("model", type=Path, help="model folder, or run folder")
    one.add_argument("output", type=Path, help="folder to write")
    one.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the weights (default: the model's)")
    one.add_argument("--max-shard-gb", type=_size, default=5.0, help="largest file in 10^9 bytes (default: 5)")
    _eval_arguments(verb("eval", "evaluate held-out loss and perplexity by domain, or lm-evaluation-harness tasks"))
    one = verb("mixture", "apply a mixture rule to a run's recorded losses, and plot the weights")
    one.add_argument("action", choices=("simulate",), help="action")
    one.add_argument("run", type=Path, help="run folder, or a metrics.jsonl")
    one.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of mixture, such as mixture.rule=ado")
    one.add_argument("--output", type=Path, help="output folder (default: plots next to the records)")
    verb("env", "report versions, devices and the backend of each op")
    one = verb("plot", "plot losses, sparsities and the mixture of a run")
    one.add_argument("run", type=Path, help="run folder")
    one.add_argument("--output", type=Path, help="output folder (default: plots in the run folder)")
    one = verb("report", "write an HTML report of a run: losses, kept units, cost, plots")
    one.add_argument("run", type=Path, help="run folder")
    one.add_argument("other", type=Path, nargs="?", help="run folder to compare it with")
    one.add_argument("--output", type=Path, metavar="FILE", help="HTML file (default: report.html in the run folder)")
    return parser


def _eval_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", type=Path, help="model folder, or run folder (its final or else its pruned model)")
    one.add_argument("data", type=Path, nargs="?", help="dataset folder; its held-out text is used")
    one.add_argument("--sequence-length", type=_count, default=4096, help="tokens of a sequence (default: 4096)")
    one.add_argument("--sequences", type=_count, default=64, help="sequences of each domain (default: 64)")
    one.add_argument(
        "--separate-documents", action="store_true", help="restrict attention to documents, as data.separate_documents"
    )
    one.add_argument("--tensor", type=_count, default=1, help="tensor parallel size under torchrun (default: 1)")
    one.add_argument("--pipeline", type=_count, default=1, help="pipeline parallel size under torchrun (default: 1)")
    one.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness instead of a dataset")
    one.add_argument("--limit", type=_count, help="examples per task (default: all)")
    one.add_argument("--include", type=Path, metavar="FOLDER", help="folder with additional task files")
    one.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0")
    return number


def _import(options: argparse.Namespace) -> None:
    from megashear.hf.import_model import import_model

    import_model(options.source, options.output)


def _check(options: argparse.Namespace) -> None:
    from megashear.config.load import load_config
    from megashear.planning import plan_tables
    from megashear.planning.check import check

    if options.presets:
        print(plan_tables.presets_table())
    if options.file is None:
        if not options.presets:
            raise ConfigError("check: no run file; give one, or --presets")
        return
    config = load_config(options.file, options.overrides)
    print(plan_tables.render(config, check(config, _source_shape(config), None)))


def _source_shape(config: "Config") -> "ModelShape | None":
    """The shape of the source's folder; null where there is no such folder here."""
    from megashear.hf.hf_config import NAME, read_config, shape_of_config

    if config.source.folder is None or not Path(config.source.folder).is_dir():
        return None
    folder = Path(config.source.folder)
    return shape_of_config(read_config(folder), folder / NAME)


def _run(options: argparse.Namespace, phases: list[str] | None = None) -> None:
    from megashear.config.load import load_config
    from megashear.planning.check import check

    profile = ["logging.profile_steps=3"] if getattr(options, "profile", False) else []
    config = load_config(options.file, [*profile, *options.overrides])
    for phase in phases or []:
        if phase not in config.run.phases:
            raise ConfigError(f"run.phases: it does not name {phase}; add it to the run file")
    source = _source_shape(config)
    if config.source.folder is not None and source is None:
        raise ModelError(f"source.folder: {config.source.folder} is no folder; run `megashear import` first")
    check(config, source, int(os.environ.get("WORLD_SIZE", "1")))  # before torch is loaded

    from megashear.processes import stop_on_signals

    with stop_on_signals() as stop:
        from megashear.phases.runner import run  # loads torch, which takes seconds

        # megatron-core's saving collects garbage; it need not walk through half a million objects of what is loaded.
        gc.freeze()
        run(config, phases, stop)


def _prune(options: argparse.Namespace) -> None:
    _run(options, ["prune"])


def _finalize(options: argparse.Namespace) -> None:
    _run(options, ["finalize"])


def _pretrain(options: argparse.Namespace) -> None:
    _run(options, ["pretrain"])


def _export(options: argparse.Namespace) -> None:
    from megashear.hf.export_model import export_model

    export_model(options.model, options.output, options.dtype, options.max_shard_gb)


def _eval(options: argparse.Namespace) -> None:
    from megashear.config.schema import ParallelConfig

    if (options.data is None) == (options.tasks is None):
        raise ConfigError("eval: give a dataset folder (DATA), or tasks (--tasks), and not both")
    if options.tasks is not None:
        from megashear.evaluation.harness import evaluate_tasks

        evaluate_tasks(options.model, options.tasks.split(","), options.json, options.limit, options.include)
        return
    from megashear.evaluation.evaluate_model import HeldOutChoice, evaluate

    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    heldout = HeldOutChoice(options.sequence_length, options.sequences, options.separate_documents)
    evaluate(options.model, options.data, heldout, parallel, options.json)


def _mixture(options: argparse.Namespace) -> None:
    from megashear.phases.simulate_mixture import simulate

    simulate(options.run, options.overrides, options.output)


def _env(options: argparse.Namespace) -> None:
    from megashear import ops
    from megashear.engine.environment import describe

    rows = describe() + [(f"op {name}", served) for name, served in ops.backend().items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _plot(options: argparse.Namespace) -> None:
    from megashear.plots.run_plots import plot_run

    for path in plot_run(options.run, options.output):
        print(path)


def _report(options: argparse.Namespace) -> None:
    from megashear.report.run_report import write_report

    print(write_report(options.run, options.other, options.output))


VERBS = {
    "import": _import,
    "check": _check,
    "run": _run,
    "prune": _prune,
    "finalize": _finalize,
    "pretrain": _pretrain,
    "export": _export,
    "eval": _eval,
    "mixture": _mixture,
    "env": _env,
    "plot": _plot,
    "report": _report,
}
