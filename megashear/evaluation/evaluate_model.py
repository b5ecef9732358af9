"""Evaluate a finished model on held-out text, by domain (`megashear eval MODEL DATA`).

The model runs in fp32 through the code that trains, on any layout. A dataset made with another tokenizer is refused.
"""

import math
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.config.shape_legality import shape_problems
from megashear.dataset.dataset_folder import Dataset
from megashear.engine.collectives import on_main
from megashear.engine.layout import Layout, distributed
from megashear.engine.parallel import transformer_config
from megashear.errors import ConfigError, DataError, ModelError
from megashear.evaluation.heldout import evaluate_heldout
from megashear.evaluation.losses import Losses, loss_table, to_json
from megashear.files.atomic import write_json
from megashear.files.file_digests import digest
from megashear.hf.hf_config import NAME as CONFIG
from megashear.hf.model_folder import ModelFolder
from megashear.mixture.loader import HeldOut
from megashear.model.weight_io import TensorSource, filled_chunks

MICRO_BATCH = 4
FINISHED = ("final", "pruned")
"""Models of a run folder, the one that was trained last first."""


@dataclass(frozen=True)
class HeldOutChoice:
    """Held-out text to evaluate: tokens per sequence, sequences per domain, attention within documents."""

    sequence_length: int = 4096
    sequences: int = 64
    separate_documents: bool = False


def find_model(path: Path) -> Path:
    """Model folder at `path`, or the last model of the run folder at `path`. Raises ModelError if there is neither."""
    for candidate in (path, *(path / name for name in FINISHED)):
        if (candidate / CONFIG).is_file():
            return candidate
    raise ModelError(
        f"{path}: neither a model folder ({CONFIG}) nor a run that has pruned or trained a model; give one, or "
        "finish the run (`megashear run`)"
    )


def evaluate(
    model: Path | str,
    data: Path | str,
    heldout: HeldOutChoice | None = None,
    parallel: ParallelConfig | None = None,
    output: Path | None = None,
) -> Losses:
    """Evaluate a model on the held-out text of a dataset, in fp32, and print the table of losses.

    Call it in one process, or on every rank of a torchrun job.

    Args:
        model: Model folder, or run folder (its last model is evaluated).
        data: Dataset folder.
        heldout: Held-out sequences to evaluate; default 64 of 4,096 tokens per domain.
        parallel: Layout; default one rank, or data parallelism over all ranks.
        output: JSON file to write.

    Returns:
        Loss in nats per token and its standard error, by domain; the same on every rank.

    Raises:
        ConfigError: The model does not fit the layout.
        DataError: The dataset is damaged, or its tokenizer is not the model's.
        ModelError: There is no model at `model`, or it is damaged.
        StorageError: `output` cannot be written.
    """
    heldout, parallel = heldout or HeldOutChoice(), parallel or ParallelConfig()
    data = Path(data)
    with distributed(parallel) as layout:
        path = find_model(Path(model))
        on_main(layout, lambda: verify_model(path))
        losses = model_losses(ModelFolder.open(path), Dataset.open(data), heldout, parallel, layout)
        on_main(layout, lambda: write_losses(path, data, heldout, losses, output))
    return losses


def model_losses(
    folder: ModelFolder, dataset: Dataset, heldout: HeldOutChoice, parallel: ParallelConfig, layout: Layout
) -> Losses:
    """Held-out losses in nats per token, and their errors, by domain; the same on every rank."""
    on_main(layout, lambda: check_tokenizer(dataset, folder))
    problems = shape_problems(folder.shape, None, parallel, layout.world_size)
    if problems:
        raise ConfigError(problems)
    sequences = HeldOut(dataset, *astuple(heldout))
    chunks = plain_chunks(folder.shape, folder, parallel, layout)
    return evaluate_heldout(sequences, layout, chunks, MICRO_BATCH)


def plain_chunks(
    shape: ModelShape,
    source: TensorSource,
    parallel: ParallelConfig,
    layout: Layout,
    exact: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Module]:
    """This rank's chunks of a model in fp32 or fp64, without optimizer. `exact` is that of `prune.masking`."""
    return list(filled_chunks(shape, transformer_config(shape, parallel, dtype), layout, source, exact))


def verify_model(path: Path) -> None:
    """Compare a model folder with its manifest's digests, if it has one. Raises ModelError."""
    folder = ModelFolder.open(path)
    if folder.manifest:
        ModelFolder.open(path, digests=True)


def write_losses(path: Path, data: Path, heldout: HeldOutChoice, losses: Losses, output: Path | None) -> None:
    """Print the table of losses, and write them to the JSON file `output`."""
    print(loss_table({path.name: losses}))
    if output is not None:
        write_json(
            output,
            {
                "model": str(path),
                "data": str(data),
                "sequence_length": heldout.sequence_length,
                "separate_documents": heldout.separate_documents,
                "losses": {name: pair[0] for name, pair in to_json(losses).items()},
                "errors": {name: pair[1] for name, pair in to_json(losses).items()},
                "perplexities": {name: perplexity(loss) for name, (loss, _) in losses.items()},
            },
        )


def perplexity(loss: float) -> float | None:
    """exp of a loss in nats per token; None if it is not finite."""
    return math.exp(loss) if loss < 700 else None


def check_tokenizer(dataset: Dataset, source: ModelFolder) -> None:
    """Raise DataError if the dataset was made with another tokenizer than the source's."""
    where = f"{dataset.folder}: made with another tokenizer than the one of {source.path}"
    advice = "preprocess the data again with the source's tokenizer"
    if dataset.vocab_size > source.shape.vocab_size:
        raise DataError(f"{where}: {dataset.vocab_size} tokens, the model knows {source.shape.vocab_size}; {advice}")
    files = [path for path in source.tokenizer_files if path.name in ("tokenizer.json", "tokenizer.model")]
    if files and dataset.tokenizer_digest not in {digest(path) for path in files}:
        raise DataError(f"{where} (by SHA-256); {advice}")
