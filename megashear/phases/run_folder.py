"""Run folder: what the phases of a run share, and the records of finished phases.

A run folder belongs to one configuration. Keys that determine the result are recorded and may not change on resume;
layout, checkpoints, logging and export may.
"""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megashear.config.load import to_dict
from megashear.config.model_shape import ModelShape
from megashear.config.presets import resolve_shape
from megashear.config.resolve import (
    DEFAULT_WEIGHT_KEY,
    DONE,
    FORMAT_VERSION,
    IDENTITY,
    DistillationPlan,
    default_distillation_weight,
    distillation_plans,
    run_prunes,
    training_tokens_of,
)
from megashear.config.schema import Config
from megashear.dataset.dataset_folder import Dataset
from megashear.engine.collectives import on_main
from megashear.engine.layout import Layout
from megashear.errors import CheckpointError, ConfigError, ModelError
from megashear.evaluation.evaluate_model import check_tokenizer
from megashear.files.atomic import write_json
from megashear.files.file_digests import check_files
from megashear.hf.model_folder import ModelFolder
from megashear.processes import StopRequest
from megashear.train.training_phase import Callback

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNSET = object()
"""A key that one of two records lacks."""
FREE_SECTIONS = {"parallel", "checkpoint", "logging", "export"}
FREE_KEYS = (
    ("data", "folder"),
    ("data", "prefetch"),
    ("data", "max_epochs"),
    ("source", "folder"),
    ("prune", "distillation", "chunk"),
    ("pretrain", "distillation", "chunk"),
)


@dataclass
class Context:
    """State shared by the phases of a run."""

    config: Config
    layout: Layout
    folder: Path
    dataset: Dataset
    source: ModelFolder | None
    source_shape: ModelShape
    target_shape: ModelShape | None
    stop: StopRequest
    callbacks: Sequence[Callback] = ()
    """The caller's own callbacks of the training loop."""
    evaluation_seconds: float = 0.0
    """What held-out evaluations took since the start, those of training loops left out."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and matrix products."""
        return DTYPES[self.config.precision]

    def distillation_plans(self, phase: str) -> DistillationPlan:
        """Resolved distillation settings of a phase. Call it on every rank."""
        return on_main(self.layout, lambda: distillation_plans(self.config, self.source_shape, self.target_shape))[
            phase
        ]

    def model_folder(self, name: str) -> Path:
        """Path of a model of the run: `principal`, `fitted`, `masked`, `pruned` or `final`."""
        return self.folder / name

    def open_model(self, name: str) -> ModelFolder:
        """Open a model of the run after verifying its digests. Raises ModelError, on every rank."""
        folder = self.model_folder(name)

        def verify() -> None:
            ModelFolder.open(folder, digests=True)

        on_main(self.layout, verify)
        return ModelFolder.open(folder)

    def done(self, phase: str) -> dict[str, Any] | None:
        """Record of a finished phase, or None; the same on every rank."""
        return on_main(self.layout, lambda: read_record(self.folder / phase / DONE))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time of a held-out evaluation outside of a training loop."""
        started = time.monotonic()
        yield
        self.evaluation_seconds += time.monotonic() - started

    def finish(self, phase: str, record: dict[str, Any]) -> None:
        """Write the record of a finished phase."""
        on_main(self.layout, lambda: write_json(self.folder / phase / DONE, record))

    def tokenizer_and_license_files(self) -> list[Path]:
        """Tokenizer and licence files for the run's models: the source's, else the dataset's tokenizer."""
        if self.source is not None and self.source.tokenizer_files:
            return self.source.tokenizer_files + self.source.companion_files
        return sorted(path for path in (self.dataset.folder / "tokenizer").iterdir() if path.is_file())

    def hf_config(self) -> dict[str, Any]:
        """Hugging Face keys for the run's models: the source's, else the dataset's end-of-document token."""
        if self.source is not None:
            return self.source.config
        return {"eos_token_id": self.dataset.eos_id, "bos_token_id": None}

    def provenance(self, phases: list[dict[str, Any]]) -> dict[str, Any]:
        """Provenance of a model of this run, for its manifest and model card."""
        known: dict[str, Any] = {"phases": phases}
        if self.source is not None:
            known["source"] = {"path": str(self.config.source.folder), "shape": to_dict(self.source_shape)}
            if (tokens := training_tokens_of(self.source.path)) is not None:
                known["source"]["tokens"] = tokens
        return known


def open_context(config: Config, layout: Layout, stop: StopRequest, callbacks: Sequence[Callback] = ()) -> Context:
    """Open dataset and source, resolve shapes, and claim the run folder. Raises the errors of each."""
    if config.data.folder is None:
        raise ConfigError("data.folder: null; name a dataset folder made by tools/preprocess_data.py")
    dataset = Dataset.open(config.data.folder)
    source = None if config.source.folder is None else ModelFolder.open(Path(config.source.folder))
    if source is not None:
        check_tokenizer(dataset, source)
        source_shape = source.shape
    else:
        source_shape = resolve_shape(config.source.shape, None, vocab_size=dataset.vocab_size, section="source.shape")
    target = None
    if on_main(layout, lambda: run_prunes(config)):
        target = resolve_shape(config.target, source_shape, section="target")
    folder = Path(config.run.folder)
    context = Context(config, layout, folder, dataset, source, source_shape, target, stop, callbacks)
    on_main(layout, lambda: claim_run_folder(context))
    return context


def claim_run_folder(context: Context) -> None:
    """Record what the run computes at its first start; compare with the record afterwards.

    The first start compares the SHA-256 of every file of dataset and source with their manifests, and records the
    resolved default of `distillation.weight`.

    Raises:
        CheckpointError: The folder belongs to another configuration.
        DataError, ModelError: A file is damaged.
    """
    own = {"format_version": FORMAT_VERSION} | identity(context.config)
    own["data_digest"] = context.dataset.digest()
    own["source_digest"] = None if context.source is None else context.source.digest()
    path = context.folder / IDENTITY
    there = read_record(path)
    if there is None:
        context.dataset.verify()
        if context.source is not None and context.source.manifest:
            check_files(context.source.path, context.source.manifest, ModelError)
        weight = default_distillation_weight(context.config, context.source_shape, context.target_shape)
        write_json(path, own | {DEFAULT_WEIGHT_KEY: weight})
        return
    if (version := there.get("format_version", "unknown")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version}, this version of megashear reads {FORMAT_VERSION}; finish the run "
            "with the version that started it, or choose another run.folder"
        )
    there.pop(DEFAULT_WEIGHT_KEY, None)
    changed = differences(there, own, "")
    if changed:
        raise CheckpointError(
            f"{context.folder}: holds a run of another configuration; changed since: {'; '.join(changed)}. "
            "Change it back, or choose another run.folder"
        )


def identity(config: Config) -> dict[str, Any]:
    """Keys of a config that may not change on resume, as JSON values; data and source are identified by digests."""
    values = to_dict(config)
    own: dict[str, Any] = {name: value for name, value in values.items() if name not in FREE_SECTIONS}
    own["run"] = {"seed": values["run"]["seed"]}
    own = json.loads(json.dumps(own))
    for *sections, free in FREE_KEYS:
        functools.reduce(dict.__getitem__, sections, own).pop(free)
    for taught in (own["prune"]["distillation"], own["pretrain"]["distillation"]):
        if taught["weight"] == 0:  # no teacher, so nothing that these could change
            del taught["temperature"], taught["stop_when"]
    return own


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a JSON record of the run; None if it does not exist. Raises CheckpointError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore it, or choose another run.folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a record of a run; restore it, or choose another run.folder")
    return found


def differences(there: Any, here: Any, name: str) -> list[str]:
    """List keys whose values differ, as `a.b: old -> new`; a missing key is `unset`."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            found += differences(there.get(key, UNSET), here.get(key, UNSET), inner)
        return found
    if there == here:
        return []
    before, now = ("unset" if value is UNSET else value for value in (there, here))
    return [f"{name}: {before} -> {now}"]
