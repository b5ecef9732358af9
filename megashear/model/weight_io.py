"""Build a rank's model chunks, load their weights, and write the model as a folder.

A rank reads its own slices only. Random weights are a function of (seed, tensor name), so every layout starts from the
same model. For writing, whole tensors are gathered over the tensor-parallel group one parameter at a time, and each
pipeline stage writes its own. The folder gets its name after all tensors were written and read back.
"""

import functools
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.engine.collectives import gather_objects, gather_rows, on_main
from megashear.engine.layout import Layout
from megashear.engine.optimizer import unwrap
from megashear.engine.parallel import CoreConfig
from megashear.engine.pipeline import build_chunks
from megashear.errors import MegashearError
from megashear.files.atomic import publish_folder, storage_error
from megashear.hf.finish_folder import seal_folder, write_settings
from megashear.hf.safetensors_writer import ShardedWriter
from megashear.hf.tensor_names import tensor_shapes
from megashear.model.llama import Llama
from megashear.model.tensor_placement import Piece, chunk_pieces


class TensorSource(Protocol):
    """Source of weights, with Hugging Face's names and full shapes."""

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) start .. stop of a tensor."""
        ...


class RandomWeights:
    """A model from scratch: N(0, 0.02), products into the residual stream divided by sqrt(2 L), norms 1 (GPT-2,
    section 2.3).
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.seed = shape, seed
        self.shapes = tensor_shapes(shape)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """A slice of the tensor that (seed, name) determine, in fp32."""
        full = self.shapes[name]
        if len(full) == 1:
            return torch.ones(stop - start)
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * self.shape.num_layers) if residual else 0.02
        return (torch.randn(full, generator=generator) * deviation).narrow(dim, start, stop - start)


def read_piece(source: TensorSource, piece: Piece) -> Tensor:
    """A piece with its padding rows of zeros."""
    part = source.read_slice(piece.name, piece.dim, piece.start, piece.stop)
    if not piece.padding:
        return part
    return torch.cat([part, part.new_zeros(piece.padding, *part.shape[1:])])


@torch.no_grad()
def load_weights(module: Llama, source: TensorSource) -> None:
    """Load a chunk's parameters, in their own dtype."""
    pieces = chunk_pieces(module.shape, module.layout, module.layer_range, module.pre_process, module.post_process)
    for name, parameter in module.named_parameters():
        row = 0
        for piece in pieces.pop(name):
            part = read_piece(source, piece)
            parameter[row : row + len(part)].copy_(part)
            row += len(part)
        assert row == len(parameter), f"{name}: {row} of {len(parameter)} rows filled"
    assert not pieces, f"pieces without a parameter: {sorted(pieces)}"


def filled_chunks(
    shape: ModelShape,
    core: CoreConfig,
    layout: Layout,
    source: TensorSource,
    mask_embedding: bool = True,
    recompute: bool = False,
) -> list[Llama]:
    """Build this rank's chunks and load their weights from `source`."""

    def build(layers: range, pre: bool, post: bool, stage: int | None) -> Llama:
        return Llama(shape, core, layout, layers, pre, post, mask_embedding, recompute, vp_stage=stage)

    chunks = build_chunks(shape.num_layers, layout, build)
    for chunk in chunks:
        load_weights(chunk, source)
    return chunks


def gather_tensors(
    module: Llama, value: Callable[[Tensor], Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Names and complete tensors of a chunk's parameters, in Hugging Face's form, without vocabulary padding.

    `value` selects what is gathered (the parameter, or its gradient). The last stage's copy of a tied embedding is
    omitted if the first stage has it.
    """
    shapes = tensor_shapes(module.shape)
    layouts = [replace(module.layout, tensor_rank=rank) for rank in range(module.layout.tensor_size)]
    args = (module.layer_range, module.pre_process, module.post_process)
    pieces_by_rank = [chunk_pieces(module.shape, layout, *args) for layout in layouts]
    for name, parameter in module.named_parameters():
        if name == "output.weight" and module.tied:
            continue
        parts = gather_rows(value(parameter)).split(len(parameter))
        whole: dict[str, Tensor] = {}
        for part, pieces in zip(parts, (pieces[name] for pieces in pieces_by_rank), strict=True):
            row = 0
            for piece in pieces:
                if piece.name not in whole:
                    whole[piece.name] = part.new_empty(shapes[piece.name])
                target = whole[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
                target.copy_(part[row : row + len(target)])
                row += len(target) + piece.padding
        yield from whole.items()


def write_model(
    chunks: list[torch.nn.Module],
    shape: ModelShape,
    dtype: torch.dtype,
    folder: Path,
    layout: Layout,
    config: dict[str, Any],
    tokenizer_and_license_files: list[Path],
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
            write_settings(temporary, shape, dtype, config, tokenizer_and_license_files)
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
    """Write this rank's tensors. After a failure keep gathering, so that no rank waits, and raise on all of them."""
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
