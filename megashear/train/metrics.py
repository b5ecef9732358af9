"""Write a run's records: `metrics.jsonl`, TensorBoard, Weights & Biases, `masks.npz`, `heldout.json`.

`metrics.jsonl` is authoritative and continuous over interruptions. A logger that fails (full disk, lost network) warns
once, is switched off, and never stops training. torch is imported only for TensorBoard.

Records, one JSON object per line; non-finite numbers are null.
  train  {"phase": "prune"|"pretrain", "step": int, "kind": "train", "loss": float (nats per token), "lr": float,
          "distillation": float (T^2 KL, nats per token), "teacher_loss": float (both while a teacher is used),
          "teacher_flops": float (share of training the whole model), "distilled_steps": int (with a teacher),
          "grad_norm": float, "tokens": int (of the phase), "tokens_per_second": float, "step_seconds": float,
          "seconds": float (since the phase's start), "evaluation_seconds": float (part of it),
          "domain_tokens": {domain: int}, "domain_epochs": {domain: float (of the run)}, "skipped": int (steps)}
  mask   {"phase", "step", "kind": "mask", "expected": {granularity: sparsity}, "target": {granularity: sparsity},
          "lambda1": {granularity: float}, "lambda2": {granularity: float}, "lagrangian": float,
          "live_flops": computed share of the source's FLOPs in this step | null,
          "live_steps": the same summed over the phase's steps | null}
  eval   {"phase", "step", "kind": "eval", "loss": {domain: float}, "error": {domain: standard error of the loss},
          "reference": {domain: float} | null, "weights": {domain: weight after the update}}

`masks.npz` holds the deterministic masks of the last evaluation while pruning, then those of finalize, fp32: hidden
[d], head [L, H], intermediate [L, I], layer [L]; granularities that are not learned are absent.
"""

import errno
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import orjson

from megashear.errors import DataError, Interrupted
from megashear.evaluation.losses import SEQUENCES_NAME, SequenceLosses, save_sequences
from megashear.files.atomic import atomic_file, write_text

FILE_NAME = "metrics.jsonl"
MASKS_NAME = "masks.npz"
SCORES_NAME = "importance.safetensors"
Record = Mapping[str, Any]

logger = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in the order written; a last line that a kill tore off is left out.

    Raises DataError where the file is missing or another line than the last is not a record.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run that has trained") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: not a record of a run; remove the line to read the others")
        records.append(record)
    return records


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The record's numbers by name, as TensorBoard and W&B take them: `train/loss`, `eval/loss/wiki`."""
    for name, value in record.items():
        tags = (
            {f"{name}/{inner}": number for inner, number in value.items()} if isinstance(value, dict) else {name: value}
        )
        for tag, number in tags.items():
            if name != "step" and isinstance(number, Real):
                yield f"{record['kind']}/{tag}", float(number)


class Sink(Protocol):
    """One place where records go. Any exception switches it off."""

    name: str

    def resume(self, phase: str, step: int) -> None:
        """Forget the phase's records after `step`; all of them where `step` is 0."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def close(self) -> None:
        """Flush and release what is open."""


class JsonLines:
    """`metrics.jsonl`: a line reaches the file system whole with the call that writes it."""

    def __init__(self, folder: Path) -> None:
        """Open `folder/metrics.jsonl` for appending; a line torn off by a kill is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self.name = str(self.path)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        self._file.seek(0)
        self._file.truncate(self._file.readall().rfind(b"\n") + 1)

    def resume(self, phase: str, step: int) -> None:
        """Forget the phase's records after `step` (all where it is 0); the file is replaced whole."""
        kept = [r for r in read_metrics(self.path) if r.get("phase") != phase or 0 < step >= r.get("step", 0)]
        self._file.close()
        try:
            write_text(self.path, "".join(orjson.dumps(r).decode() + "\n" for r in kept))
        finally:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: Record) -> None:
        """Append one line, or leave the file as it was and raise OSError."""
        line = orjson.dumps(dict(record), option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        size = self.path.stat().st_size
        if self._file.write(line) != len(line):
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard events in `folder/tensorboard/PHASE`: phases are its runs, so equal tags lie over each other."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        """Raises ImportError where TensorBoard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[..., Any] = SummaryWriter
        self._folder = folder / "tensorboard"
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}

    def resume(self, phase: str, step: int) -> None:
        """Have events after `step` purged (all where it is 0), by the mark that TensorBoard itself reads."""
        writer = self._writers.pop(phase, None)
        if writer is not None:
            writer.close()
        self._purge[phase] = step + 1 if step > 0 else 0

    def write(self, record: Record) -> None:
        """Write every number of the record."""
        phase = record["phase"]
        if phase not in self._writers:
            self._writers[phase] = self._open(str(self._folder / phase), purge_step=self._purge.get(phase))
        for tag, number in scalars(record):
            self._writers[phase].add_scalar(tag, number, record["step"])

    def close(self) -> None:
        """Flush and close the event files."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """One W&B run per run folder; its id is kept in `folder/wandb_id`, so that a resumed run goes on in the same one.

    W&B cannot forget: after a resume it holds the steps since the last checkpoint twice. `metrics.jsonl` does not.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, project: str, run_name: str) -> None:
        """Raises ImportError where wandb is not installed, and its own errors where it cannot log in."""
        import wandb

        path = folder / "wandb_id"
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:12])
        identity = path.read_text(encoding="utf-8").strip()
        self._run = wandb.init(project=project, name=run_name, id=identity, resume="allow", dir=str(folder))
        for phase in ("prune", "pretrain"):
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def resume(self, phase: str, step: int) -> None:
        """Nothing to do: what W&B has received stays."""

    def write(self, record: Record) -> None:
        """Log every number of the record under its phase."""
        values = {f"{record['phase']}/{tag}": number for tag, number in scalars(record)}
        self._run.log({**values, f"{record['phase']}/step": record["step"]})

    def close(self) -> None:
        """Finish the run: what is still queued is sent."""
        self._run.finish()


class Metrics:
    """A run's records, written to every place that was asked for and works. Made on every rank, enabled on one.

    A context manager: leaving it closes all places.
    """

    def __init__(
        self, folder: Path, tensorboard: bool, wandb_project: str | None, run_name: str, enabled: bool = True
    ) -> None:
        """folder: the run's; wandb_project: None is off; enabled: False makes every method do nothing."""
        self._folder = Path(folder)
        self._sinks: list[Sink] = []
        self._files = {save_masks, save_sequences} if enabled else set()
        if not enabled:
            return
        self._add("metrics.jsonl", lambda: JsonLines(self._folder))
        if tensorboard:
            try:
                self._add("TensorBoard", lambda: TensorBoard(self._folder), optional=True)
            except ImportError:
                logger.info("TensorBoard is not installed: no events are written (pip install tensorboard)")
        if wandb_project is not None:
            self._add("Weights & Biases", lambda: WeightsAndBiases(self._folder, wandb_project, run_name))

    def resume(self, phase: str, step: int) -> None:
        """Take up `phase` after `step`: its records with a larger step are cut off, all of them where `step` is 0.

        To be called once at the start of every phase, before anything is written.
        """
        self._each(lambda sink: sink.resume(phase, step))

    def write(self, record: Record) -> None:
        """Write a record of the schema above; values are Python's or numpy's numbers."""
        self._each(lambda sink: sink.write(record))

    def write_masks(self, masks: Mapping[str, np.ndarray]) -> None:
        """Replace `masks.npz`; masks: deterministic masks by granularity, shapes in the module's docstring."""
        self._save(save_masks, self._folder / MASKS_NAME, self._folder, masks)

    def write_sequences(self, phase: str, losses: SequenceLosses, digests: Callable[[], Mapping[str, str]]) -> None:
        """Replace the phase's `heldout.json`; losses of its held-out sequences, what gives digests of their text."""
        if save_sequences in self._files:
            folder = self._folder / phase
            self._save(save_sequences, folder / SEQUENCES_NAME, folder, losses, digests())

    def _save(self, save: Callable[..., None], path: Path, *arguments: Any) -> None:
        """Write a file; any failure but a stop signal is a warning, and the last try."""
        if save not in self._files:
            return
        try:
            save(*arguments)
        except Interrupted:
            raise
        except Exception as error:
            self._files.remove(save)
            warn(str(path), error)

    def close(self) -> None:
        """Flush and close every place."""
        self._each(lambda sink: sink.close())
        self._sinks = []

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, name: str, make: Callable[[], Sink], optional: bool = False) -> None:
        """Open a place; one that fails is left out with a warning, a missing optional library raises ImportError."""
        try:
            self._sinks.append(make())
        except Interrupted:
            raise
        except Exception as error:
            if optional and isinstance(error, ImportError):
                raise
            warn(name, error)

    def _each(self, call: Callable[[Sink], None]) -> None:
        """Call every place; any failure of one but a stop signal is a warning, and its end."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Interrupted:
                raise
            except Exception as error:
                self._sinks.remove(sink)
                warn(sink.name, error)


def warn(name: str, error: Exception) -> None:
    """Warn once that a logger is switched off; training continues."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    logger.warning("%s: cannot be written (%s); switched off, training continues", name, reason)


def save_masks(folder: Path, masks: Mapping[str, np.ndarray]) -> None:
    """Write `masks.npz` of a run folder whole, or leave the one that is there."""
    with atomic_file(folder / MASKS_NAME) as temporary, open(temporary, "wb") as file:
        arrays: dict[str, Any] = {name: np.asarray(mask, np.float32) for name, mask in masks.items()}
        np.savez_compressed(file, **arrays)
