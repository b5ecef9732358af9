"""The shapes that a run begins and ends with, from whatever still tells them.

Key property: nothing is computed by a shape that is not the run's: what neither a folder, nor a manifest, nor a key
tells is None. Read next: `record.py`.
"""

from pathlib import Path
from typing import Any

from megashear.config.dataset import read_dataset
from megashear.config.presets import resolve_shape
from megashear.config.schema import Config
from megashear.config.shape import ModelShape, RopeScaling
from megashear.errors import DataError, MegashearError, ModelError
from megashear.files.manifest import read_manifest
from megashear.weights.hf_config import read_config, shape_of_config


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
