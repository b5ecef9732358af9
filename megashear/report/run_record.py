"""Read a run folder for a report: config, shapes, finished phases, losses, metrics, masks.

Reads JSON, YAML and `.npz` without pickles, whether or not the run has finished or its source still exists. Missing
parts are listed; a damaged file is one DataError. A shape that neither a folder, a manifest nor a key determines is
None.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megashear.config.load import load_config
from megashear.config.model_shape import ModelShape, RopeScaling
from megashear.config.presets import resolve_shape
from megashear.config.resolve import DONE, IDENTITY, known_phases
from megashear.config.schema import Config
from megashear.errors import ConfigError, DataError, MegashearError, ModelError
from megashear.evaluation.losses import DomainSequences, Losses, from_json, number, read_sequences
from megashear.files.file_digests import read_manifest
from megashear.hf.hf_config import read_config, shape_of_config
from megashear.planning.dataset_plan import read_dataset
from megashear.plots.metric_series import Phase, phases_of
from megashear.plots.run_plots import read_masks
from megashear.train.metrics import FILE_NAME, MASKS_NAME, read_metrics


def shapes(folder: Path, config: Config | None, sheared: bool) -> tuple[ModelShape | None, ModelShape | None]:
    """Source and target of the run in `folder`, None where not known; config: None where its file cannot be read;
    sheared: whether it makes a target, else both are one.
    """
    source = _in_folder(folder / "masked")
    if source is None and config is not None:
        if config.source.folder is not None:
            source = _in_folder(Path(config.source.folder))
        else:
            source = _resolved(config.source.shape, None, _vocabulary(config))
    source = source or _recorded(folder / "pruned") or _recorded(folder / "final")
    target = _in_folder(folder / "final") or _in_folder(folder / "pruned")
    if not sheared:
        return source or target, target or source
    if target is None and config is not None and source is not None:
        target = _resolved(config.target, source)
    return source, target


def _in_folder(folder: Path) -> ModelShape | None:
    try:
        return shape_of_config(read_config(folder), folder)
    except MegashearError:
        return None


def _recorded(folder: Path) -> ModelShape | None:
    """The source's shape, as the manifest of a model that was made from it tells it."""
    try:
        sizes = dict(read_manifest(folder, ModelError)["provenance"]["source"]["shape"])
        scaling = sizes.pop("rope_scaling", None)
        return ModelShape(**sizes, rope_scaling=None if scaling is None else RopeScaling(**scaling))
    except (ModelError, KeyError, TypeError, ValueError):
        return None


def _vocabulary(config: Config) -> int | None:
    """Token ids of the run's dataset, which a run from scratch takes where its keys name none."""
    try:
        return None if config.data.folder is None else read_dataset(Path(config.data.folder)).vocab_size
    except DataError:
        return None


def _resolved(section: Any, source: ModelShape | None, vocab_size: int | None = None) -> ModelShape | None:
    try:
        return resolve_shape(section, source, vocab_size)
    except MegashearError:
        return None


CONFIG, SOURCE_LOSSES = "config.yaml", "source_losses.json"
COLUMNS = {"finalize": "pruned", "pretrain": "final"}  # the model that a phase's losses are of


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    config: its `run.phases` with those done before, None where the run file cannot be read any more; sheared: whether
    the run prunes or has pruned; source, target: the shapes that it begins and ends with, None where not known; done:
    records of the finished phases; phases: of `metrics.jsonl`; masks: of the cut, before it of the last evaluation
    while pruning; losses: by model (source, masked until it is cut, pruned, final, or the last evaluation of a phase
    that goes on), {domain: (nats per token, standard error)}; sequences: of the last of these models, by domain the
    losses that they are the means of, where they are recorded; missing: what the run has not, in sentences.
    """

    folder: Path
    config: Config | None
    sheared: bool
    source: ModelShape | None
    target: ModelShape | None
    done: dict[str, dict[str, Any]]
    phases: list[Phase]
    masks: dict[str, np.ndarray]
    losses: dict[str, Losses]
    sequences: dict[str, DomainSequences]
    missing: list[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    def phase(self, name: str) -> Phase:
        """The metrics of a phase; none of any kind where it has not begun."""
        return next((phase for phase in self.phases if phase.name == name), Phase(name, {}))

    def tokens(self, phase: str) -> float:
        """Tokens that a phase trained on so far."""
        recorded = self.phase(phase).values("train", "tokens")
        return float(self.done.get(phase, {}).get("tokens") or (recorded[-1] if len(recorded) else 0))


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises DataError where it is none, or a file of it is damaged."""
    folder = Path(folder)
    if not (folder / FILE_NAME).is_file() and not (folder / IDENTITY).is_file():
        raise DataError(f"{folder}: no {IDENTITY} and no {FILE_NAME} here; give the folder of a run (run.folder)")
    missing: list[str] = []
    config = _config(folder / CONFIG, missing)
    names = known_phases(folder, ["prune", "finalize", "pretrain"] if config is None else config.run.phases)
    if config is not None:
        config = replace(config, run=replace(config.run, phases=names))
    done = {name: record for name in names if (record := read_json(folder / name / DONE)) is not None}
    try:
        phases = phases_of(read_metrics(folder / FILE_NAME)) if (folder / FILE_NAME).is_file() else []
        losses = _losses(folder, done, phases)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: a record that is not one of a run ({error!r}); restore the file") from None
    missing += [f"The phase {name} has not finished." for name in names if name not in done]
    named = {*(config.run.phases if config is not None else ()), *done, *(phase.name for phase in phases)}
    sheared = not named.isdisjoint(("prune", "finalize"))
    source, target = shapes(folder, config, sheared)
    if source is None:
        missing.append("The source's shape is not known here, so FLOPs are not counted.")
    masks, sequences = read_masks(folder / MASKS_NAME), _sequences(folder, names, losses)
    return RunRecord(folder, config, sheared, source, target, done, phases, masks, losses, sequences, missing)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file. Raises DataError where it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it to read the rest") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a record of a run; remove it to read the rest")
    return value


def _config(path: Path, missing: list[str]) -> Config | None:
    try:
        return load_config(path)
    except (ConfigError, OSError) as error:
        missing.append(f"The run file cannot be read: {str(error).splitlines()[0]}")
        return None


def _losses(folder: Path, done: dict[str, dict[str, Any]], phases: list[Phase]) -> dict[str, Losses]:
    """Held-out losses by model, in the order in which a run makes them."""
    columns: dict[str, Losses] = {}
    source = read_json(folder / SOURCE_LOSSES)
    if source is not None:
        columns["source"] = from_json(source)
    for phase, column in COLUMNS.items():
        if phase in done:
            record = done[phase]
            columns[column] = {n: (number(v), number(record["errors"].get(n))) for n, v in record["losses"].items()}
    pruned = done.get("prune", {})
    if "finalize" not in done and pruned.get("losses"):
        errors = pruned.get("errors", {})
        columns["masked"] = {name: (number(v), number(errors.get(name))) for name, v in pruned["losses"].items()}
    last = phases[-1] if phases else None
    if last is not None and last.name not in done and last.records.get("eval"):
        record = last.records["eval"][-1]
        name = f"{last.name}, step {int(record['step']):,}"
        columns[name] = {n: (number(v), number((record["error"] or {}).get(n))) for n, v in record["loss"].items()}
    return columns


def _sequences(folder: Path, phases: list[str], losses: dict[str, Losses]) -> dict[str, DomainSequences]:
    """Losses by sequence of the model of the last column: those whose means are the column's."""
    last = next(reversed(losses.values()), {})
    for phase in reversed(phases):
        found = read_sequences(folder / phase)
        if found and all(name in last and float(one.loss_N.mean()) == last[name][0] for name, one in found.items()):
            return found
    return {}
