"""Read a dataset's manifest for checks: domains, tokens, and whether the run's plan fits them.

Reads JSON only. The manifest is compared with its files when the data is opened for training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.config.resolve import run_tokens
from megashear.config.schema import Config
from megashear.config.training_schema import BatchConfig
from megashear.errors import DataError
from megashear.files.file_digests import NAME, read_manifest

COSTLY_EVALUATION = 0.15
"""Share of a phase's time above which held-out evaluation is worth a warning; the defaults take less than 0.05."""


@dataclass(frozen=True)
class Domain:
    """Training and held-out tokens of a domain."""

    train_tokens: int
    heldout_tokens: int


@dataclass(frozen=True)
class Dataset:
    """Domains by name, in the manifest's order, and the tokenizer's vocabulary size."""

    domains: dict[str, Domain]
    vocab_size: int


def read_dataset(folder: Path) -> Dataset:
    """Read a dataset's manifest. Raises DataError if it is missing or not that of a dataset."""
    content = read_manifest(folder, DataError)
    try:
        domains = {
            str(name): Domain(_count(entry["train"]["tokens"]), _count(entry["heldout"]["tokens"]))
            for name, entry in content["domains"].items()
        }
        return Dataset(domains, _count(content["tokenizer"]["vocab_size"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{Path(folder) / NAME}: not the manifest of a dataset ({type(error).__name__}: {error}); "
            "make the folder with tools/preprocess_data.py"
        ) from error


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def planned_weights(config: Config, dataset: Dataset) -> dict[str, float]:
    """Initial weights, sum 1: configured, the mean of a schedule, or proportional to tokens."""
    weights = config.mixture.initial_weights
    if config.mixture.rule == "schedule" and config.mixture.schedule:
        points = [[weight / sum(row) for weight in row] for row in zip(*config.mixture.schedule.values(), strict=True)]
        weights = dict(zip(config.mixture.schedule, map(sum, zip(*points, strict=True)), strict=True))
    if weights is None:
        weights = {name: float(domain.train_tokens) for name, domain in dataset.domains.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total > 0 else {}


def dataset_problems(config: Config, dataset: Dataset, vocab_size: int | None) -> list[str]:
    """Problems of the dataset for this run: other domains, too little held-out text, another vocabulary."""
    where, problems = f"{config.data.folder}", []
    if vocab_size is not None and dataset.vocab_size > vocab_size:
        problems.append(
            f"data.folder: {where} was made with a tokenizer of {dataset.vocab_size} tokens, and the model has "
            f"{vocab_size}; make the dataset with the model's own tokenizer"
        )
    for key, values in (
        ("initial_weights", config.mixture.initial_weights),
        ("pretrain_weights", config.mixture.pretrain_weights),
        ("reference_losses", config.mixture.reference_losses),
        ("schedule", config.mixture.schedule),
    ):
        if values is None:
            continue
        unknown = sorted(values.keys() - dataset.domains.keys())
        missing = sorted(dataset.domains.keys() - values.keys())
        if unknown or missing:
            parts = [f"names {', '.join(unknown)}, not in the dataset"] if unknown else []
            parts += [f"lacks {', '.join(missing)}"] if missing else []
            problems.append(f"mixture.{key}: {' and '.join(parts)}; the domains are {', '.join(dataset.domains)}")
    for name, domain in dataset.domains.items():
        for split, tokens in (("training", domain.train_tokens), ("held-out", domain.heldout_tokens)):
            if tokens <= config.data.sequence_length:
                problems.append(
                    f"data.sequence_length: domain {name} has {tokens} {split} tokens, less than one sample of "
                    f"{config.data.sequence_length} + 1; shorten it or add data"
                )
    return problems


def dataset_warnings(config: Config, dataset: Dataset, phases: dict[str, BatchConfig]) -> list[str]:
    """Warnings about the dataset: domains that repeat too often, evaluations smaller than configured."""
    warnings = []
    total = run_tokens(config)
    for name, weight in planned_weights(config, dataset).items():
        if name not in dataset.domains:
            continue
        epochs = weight * total / max(dataset.domains[name].train_tokens, 1)
        if epochs > config.data.max_epochs:
            warnings.append(
                f"data: domain {name} would be read {epochs:.1f} times with the weights at the start, more than "
                f"data.max_epochs {config.data.max_epochs:g}; once read, data.exhausted: {config.data.exhausted}"
            )
    wanted = max((batch.eval_sequences for batch in phases.values()), default=0)
    for name, domain in dataset.domains.items():
        there = domain.heldout_tokens // (config.data.sequence_length + 1)
        if 0 < there < wanted:
            warnings.append(f"data: domain {name} has {there} held-out sequences, eval_sequences asks for {wanted}")
    for name, batch in phases.items():
        share = evaluation_share(batch, config.data.sequence_length, dataset)
        if share > COSTLY_EVALUATION:
            warnings.append(
                f"{name}.batch: held-out evaluation would take about {share:.0%} of the phase's time; raise "
                "eval_interval or lower eval_sequences"
            )
    return warnings


def evaluation_share(batch: BatchConfig, sequence_length: int, dataset: Dataset) -> float:
    """Share of a phase's time spent on evaluations, if a forward pass is a third of a training step."""
    there = (domain.heldout_tokens // (sequence_length + 1) for domain in dataset.domains.values())
    evaluated = sum(min(batch.eval_sequences, windows) for windows in there) / 3
    return evaluated / (evaluated + batch.eval_interval * batch.global_batch)
