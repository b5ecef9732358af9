"""Writing a model that is spread over ranks as a model folder: each pipeline stage writes its own tensors, one at a
time.

Nothing appears under the folder's name before all tensors are there and read back. Read next: `save.py`,
`weights/writer.py`.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megashear.config.shape import ModelShape
from megashear.engine.collectives import gather_objects, on_main
from megashear.engine.layout import Layout
from megashear.engine.optimizer import unwrap
from megashear.errors import MegashearError
from megashear.files.atomic import publish_folder, storage_error
from megashear.model.save import gather_tensors
from megashear.weights.finish import seal_folder, write_settings
from megashear.weights.names import tensor_shapes
from megashear.weights.writer import ShardedWriter


def write_model(
    chunks: list[torch.nn.Module],
    shape: ModelShape,
    dtype: torch.dtype,
    folder: Path,
    layout: Layout,
    config: dict[str, Any],
    companions: list[Path],
    provenance: dict[str, Any],
) -> None:
    """Write the chunks of all ranks as the model folder `folder`, replacing one that is there (every rank calls it).

    config: a Hugging Face config whose token ids and extra keys are kept; companions: tokenizer files to copy. Raises
    StorageError or ModelError on every rank.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")

    def create() -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            ShardedWriter.create(temporary, tensor_shapes(shape), dtype).close()
        except OSError as error:
            raise storage_error(error, folder) from error

    def seal() -> None:
        try:
            write_settings(temporary, shape, dtype, config, companions)
            seal_folder(temporary, provenance)
            publish_folder(temporary, folder)
        except OSError as error:
            raise storage_error(error, folder) from error

    try:
        on_main(layout, create)
        _write_tensors(chunks, temporary, layout)
        on_main(layout, seal)
    except MegashearError:
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_tensors(chunks: list[torch.nn.Module], folder: Path, layout: Layout) -> None:
    """Write this rank's tensors; on a failure go on gathering, so that no rank waits, and raise on all of them."""
    writer: ShardedWriter | None = None
    failure: MegashearError | None = None

    def attempt(action: Callable[[], None]) -> None:
        nonlocal failure
        try:
            if failure is None:
                action()
        except MegashearError as error:
            failure = error
        except OSError as error:
            failure = storage_error(error, folder)

    def start() -> None:
        nonlocal writer
        writer = ShardedWriter.open(folder)

    if layout.tensor_rank == 0 and layout.data_rank == 0:
        attempt(start)
    for chunk in chunks:
        for name, tensor in gather_tensors(unwrap(chunk)):
            if writer is not None:
                attempt(functools.partial(writer.write, name, tensor))
    if writer is not None:
        attempt(writer.close)
    failures = [one for one in gather_objects(failure) if one is not None]
    if failures:
        raise failures[0]
