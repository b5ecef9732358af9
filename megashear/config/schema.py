"""Every key of a run file, with its type, default and meaning: one frozen dataclass a section.

Key properties: the meaning stands in the field's metadata (`help`), from which `docs/config.md` and the recipes are
made; `null` as a default means "derived", and the meaning says from what. Read next: `load.py`, `check.py`.
"""
# ruff: noqa: RUF009 - `key` makes a dataclass field and the sections are frozen, so nothing mutable is shared

from dataclasses import dataclass

from megashear.config.field import key
from megashear.config.training_schema import PretrainConfig, PruneConfig

PHASES = ("prune", "finalize", "pretrain", "export")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and which phases it walks."""

    folder: str = key("runs/default", "folder of the run: checkpoints, logs, results")
    phases: list[str] = key(
        list(PHASES),
        "phases in order, of: prune, finalize, pretrain, export; a phase that is done is not run again",
        PHASES,
    )
    seed: int = key(1234, "seed of initial weights, data order and mask noise", low=0)


@dataclass(frozen=True)
class ShapeConfig:
    """A shape by preset, by sizes, or a preset with some sizes changed; what is left null comes from the source."""

    preset: str | None = key(None, "name of a shape (`megashear check --presets` lists them), or null")
    hidden_size: int | None = key(None, "hidden size d", low=1)
    num_layers: int | None = key(None, "decoder layers L", low=1)
    num_heads: int | None = key(None, "query heads H", low=1)
    num_query_groups: int | None = key(
        None, "key/value heads G; null keeps the source's query heads per group, where it can", low=1
    )
    head_dim: int | None = key(
        None, "size of a head; a target inherits the source's; null is hidden_size / num_heads", low=1
    )
    intermediate_size: int | None = key(None, "width of the SwiGLU layer I", low=1)
    vocab_size: int | None = key(None, "vocabulary; from scratch null takes the dataset's", low=1)
    tie_word_embeddings: bool | None = key(None, "output layer shares the embedding")
    rope_theta: float | None = key(None, "base of the rotary frequencies", low=1)
    norm_eps: float | None = key(None, "epsilon of RMSNorm", low=1e-12)
    max_position_embeddings: int | None = key(None, "longest context that the exported config declares", low=1)


@dataclass(frozen=True)
class SourceConfig:
    """The model a run starts from: weights in a folder, or none (a shape, initialised at random)."""

    folder: str | None = key(
        None, "folder of an imported model (`megashear import`), or null: from scratch, see `shape`"
    )
    shape: ShapeConfig = key(ShapeConfig(), "shape where there is no folder, and for `check` without weights")


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    folder: str | None = key(None, "dataset folder made by tools/preprocess_data.py (holds manifest.json)")
    sequence_length: int = key(4096, "tokens predicted per sample; a sample is one token longer", low=1)
    exhausted: str = key(
        "repeat",
        "a domain that runs out: repeats, is shared among the others, or stops the run",
        ("repeat", "renormalise", "stop"),
    )
    separate_documents: bool = key(
        False,
        "attention stays inside documents, which end in EOS; their positions then start at 0 as well, since rotary "
        "attention knows distances alone",
    )
    prefetch: int = key(2, "batches read ahead of the step by threads; their order is the same; 0: none", low=0)
    repeat_limit: int | None = key(
        None,
        "epochs after which a domain that repeats has run out, and its weight is shared among the others; null: none",
        low=1,
    )
    max_epochs: float = key(4.0, "warn at the start when planned weights need more epochs of a domain than this", low=0)


@dataclass(frozen=True)
class MixtureConfig:
    """Dynamic batch loading (Sheared LLaMA, section 2.2): how domain weights follow the losses."""

    rule: str = key(
        "paper",
        "weight update: paper (excess clamped at 0), reference (the published code), static, schedule, or ado "
        "(learning speed by fitted power laws, arXiv 2410.11820; needs no reference losses)",
        ("paper", "reference", "static", "schedule", "ado"),
    )
    schedule: dict[str, list[float]] | None = key(
        None,
        "for `rule: schedule`: weights per domain at a phase's start, its end, and at equal distances between if more "
        "are given; interpolated, normalised, taken at every evaluation",
    )
    initial_weights: dict[str, float] | None = key(
        None, "weight per domain at the start, normalised; null: proportional to tokens"
    )
    pretrain_weights: dict[str, float] | None = key(
        None, "the same at the start of continued pre-training; null: where pruning ended, else initial_weights"
    )
    references: str = key(
        "source",
        "where reference losses come from: the source model's evaluation, a scaling-law file, a list",
        ("source", "scaling_law", "list"),
    )
    reference_losses: dict[str, float] | None = key(
        None, "reference loss per domain in nats per token, for `references: list`"
    )
    scaling_law: str | None = key(None, "JSON file of tools/fit_reference_losses.py, for `references: scaling_law`")
    eta: float = key(1.0, "step size of the exponential ascent", low=0)
    mixing: float = key(1e-4, "share c of the uniform distribution mixed in by the `reference` rule", low=0, high=1)
    floor: float = key(0.0, "smallest weight of a domain after an update", low=0, high=1)
    cap: float = key(1.0, "largest weight of a domain after an update", low=0, high=1)
    max_change: float = key(1.0, "largest change of a weight in one update", low=0, high=1)
    smoothing: float = key(
        0.0, "exponential smoothing of the losses: share of the previous value kept", low=0, high=0.999
    )


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the ranks; data parallelism is what is left of the world size."""

    tensor: int = key(1, "tensor parallel size", low=1)
    pipeline: int = key(1, "pipeline parallel size; layers need not divide", low=1)
    virtual_pipeline: int = key(1, "model chunks per pipeline stage (interleaved 1F1B)", low=1)
    sequence: bool = key(False, "sequence parallelism in the norms and residuals (needs tensor > 1)")
    world_size: int | None = key(None, "ranks in all, for `check` on a laptop; null: the launched ranks", low=1)
    distributed_optimizer: bool = key(True, "shard optimizer state over data-parallel ranks")
    recompute: str = key(
        "none", "activation recomputation: none, or full (each layer again in the backward)", ("none", "full")
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved."""

    interval: int = key(200, "steps between checkpoints; one is always saved at a phase's end", low=1)
    keep: int = key(2, "newest checkpoints kept per phase", low=1)


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    interval: int = key(10, "steps between progress lines", low=1)
    tensorboard: bool = key(True, "write TensorBoard events where the package is installed")
    wandb_project: str | None = key(None, "Weights & Biases project; null: off")
    profile_steps: int = key(
        0,
        "steps of a phase, from the third on, that rank 0 traces to `profile/` in the run's folder (Chrome's format, "
        "for Perfetto); 0: none; `--profile` sets 3",
        low=0,
    )
    nonfinite_limit: int = key(
        5, "skipped steps in a row (non-finite loss or gradient) after which the run stops", low=1
    )


@dataclass(frozen=True)
class ExportConfig:
    """The Hugging Face folder that leaves."""

    folder: str | None = key(None, "folder to write; null: `export` in the run folder")
    dtype: str | None = key(None, "dtype of the weights; null: the run's precision", ("fp32", "bf16", "fp16"))
    max_shard_gb: float = key(5.0, "largest safetensors file in 10^9 bytes", low=0.001)


@dataclass(frozen=True)
class Config:
    """A whole run file."""

    run: RunConfig = key(RunConfig(), "where a run lives and which phases it walks")
    source: SourceConfig = key(SourceConfig(), "the model a run starts from")
    target: ShapeConfig = key(ShapeConfig(), "the shape to prune to")
    data: DataConfig = key(DataConfig(), "what is read")
    mixture: MixtureConfig = key(MixtureConfig(), "how domain weights follow the losses")
    parallel: ParallelConfig = key(ParallelConfig(), "layout of the ranks")
    precision: str = key("bf16", "bf16 (weights and products; fp32 masters and gradients) or fp32", ("bf16", "fp32"))
    prune: PruneConfig = key(PruneConfig(), "learned masks")
    pretrain: PretrainConfig = key(PretrainConfig(), "continued pre-training")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "when a run is saved")
    logging: LoggingConfig = key(LoggingConfig(), "what is written while training")
    export: ExportConfig = key(ExportConfig(), "the Hugging Face folder that leaves")


ASCENDING = ("paper", "reference")
"""Rules that raise weights by the excess of losses over their references."""
ADAPTIVE = (*ASCENDING, "ado")
"""Rules that follow the losses."""
