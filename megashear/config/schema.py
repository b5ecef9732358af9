"""Schema of a run file: one frozen dataclass per section, each key with its type, default and meaning.

The meanings are the source of `docs/config.md` and of the comments in the recipes. Training phases are in
`training_schema.py`. A None default is `auto` in run files if the meaning says `auto: ...`; otherwise it is null.
"""
# ruff: noqa: RUF009 - `key` returns a dataclass field and the sections are frozen, so nothing mutable is shared

from dataclasses import dataclass

from megashear.config.field import key
from megashear.config.training_schema import PretrainConfig, PruneConfig

PHASES = ("prune", "finalize", "pretrain", "export")


@dataclass(frozen=True)
class RunConfig:
    """Run folder, phases and seed."""

    folder: str = key("runs/default", "folder of the run: checkpoints, logs, results")
    phases: list[str] = key(
        list(PHASES),
        "phases to run, in order: any of prune, finalize, pretrain, export; finished phases are skipped",
        PHASES,
    )
    seed: int = key(1234, "random seed of initial weights, data order and mask noise", low=0)


@dataclass(frozen=True)
class ShapeConfig:
    """A model shape: a preset, sizes, or a preset with some sizes replaced. A target inherits the rest."""

    preset: str | None = key(None, "named shape (`megashear check --presets` lists them); null: none")
    hidden_size: int | None = key(None, "hidden size d; auto: the preset's, else the source's", low=1)
    num_layers: int | None = key(None, "number of decoder layers L; auto: the preset's, else the source's", low=1)
    num_heads: int | None = key(None, "number of query heads H; auto: the preset's, else the source's", low=1)
    num_query_groups: int | None = key(
        None,
        "number of key/value heads G; auto: the preset's, else the number that keeps the source's query heads per "
        "group if possible",
        low=1,
    )
    head_dim: int | None = key(
        None, "size of a head; auto: the source's for a target, else the preset's, else hidden_size / num_heads", low=1
    )
    intermediate_size: int | None = key(
        None, "width of the SwiGLU layer I; auto: the preset's, else the source's", low=1
    )
    vocab_size: int | None = key(
        None, "vocabulary size; auto: the source's for a target, else the dataset's, else the preset's", low=1
    )
    tie_word_embeddings: bool | None = key(
        None,
        "share weights of embedding and output layer; auto: the source's for a target, else the preset's, or false",
    )
    rope_theta: float | None = key(
        None, "base of the rotary frequencies; auto: the source's for a target, else the preset's, or 10000", low=1
    )
    norm_eps: float | None = key(
        None, "epsilon of RMSNorm; auto: the source's for a target, else the preset's, or 1e-5", low=1e-12
    )
    max_position_embeddings: int | None = key(
        None,
        "maximum context in tokens, recorded in the exported config; auto: the source's for a target, else the "
        "preset's, or 4096",
        low=1,
    )


@dataclass(frozen=True)
class SourceConfig:
    """The source model: weights in a folder, or a shape with random weights."""

    folder: str | None = key(
        None, "model folder written by `megashear import`; null: random weights in the shape given by `shape`"
    )
    shape: ShapeConfig = key(
        ShapeConfig(), "shape of the source if `folder` is null, and for `megashear check` without the weights"
    )


@dataclass(frozen=True)
class DataConfig:
    """Dataset and sequences."""

    folder: str | None = key(
        None, "dataset folder written by tools/preprocess_data.py; required to train (null: no dataset)"
    )
    sequence_length: int = key(4096, "tokens predicted per sequence", low=1)
    exhausted: str = key(
        "repeat",
        "when a domain runs out of text: repeat it, renormalise (share its weight among the others), or stop the run",
        ("repeat", "renormalise", "stop"),
    )
    separate_documents: bool = key(
        False, "restrict attention to the same document and restart positions at 0 in each; documents end in EOS"
    )
    prefetch: int = key(2, "batches read ahead in background threads, in the same order; 0: none", low=0)
    repeat_limit: int | None = key(
        None,
        "epochs after which a repeated domain is dropped and its weight shared among the others; null: no limit",
        low=1,
    )
    max_epochs: float = key(
        4.0, "warn at start-up if the planned weights repeat a domain for more than this number of epochs", low=0
    )


@dataclass(frozen=True)
class MixtureConfig:
    """Dynamic batch loading (Sheared LLaMA, section 2.2): domain weights that follow the losses."""

    rule: str = key(
        "paper",
        "update of domain weights: paper (excess loss clamped at 0), reference (as the published code), static, "
        "schedule, or ado (learning speed from fitted power laws, arXiv 2410.11820; needs no reference losses)",
        ("paper", "reference", "static", "schedule", "ado"),
    )
    schedule: dict[str, list[float]] | None = key(
        None,
        "under `rule: schedule`, each domain's weights at equally spaced points from a phase's start to its end (two "
        "or more); interpolated and normalised, updated at each evaluation; null: none",
    )
    initial_weights: dict[str, float] | None = key(
        None, "initial weight of each domain, normalised; auto: proportional to its tokens"
    )
    pretrain_weights: dict[str, float] | None = key(
        None,
        "initial weights of continued pre-training, normalised; auto: the last weights of pruning, else "
        "`initial_weights`",
    )
    references: str = key(
        "source",
        "origin of the reference losses: source (evaluate the source model), scaling_law (a file), or list",
        ("source", "scaling_law", "list"),
    )
    reference_losses: dict[str, float] | None = key(
        None, "under `references: list`, reference loss of each domain in nats per token; null: none"
    )
    scaling_law: str | None = key(
        None, "under `references: scaling_law`, JSON file written by tools/fit_reference_losses.py; null: none"
    )
    eta: float = key(1.0, "step size of the exponential ascent", low=0)
    mixing: float = key(
        1e-4, "under `rule: reference`, fraction of the uniform distribution mixed into the weights", low=0, high=1
    )
    floor: float = key(0.0, "minimum weight of a domain after an update", low=0, high=1)
    cap: float = key(1.0, "maximum weight of a domain after an update", low=0, high=1)
    max_change: float = key(1.0, "maximum change of a weight in one update", low=0, high=1)
    smoothing: float = key(
        0.0, "exponential smoothing of the losses: fraction of the previous value that is kept", low=0, high=0.999
    )


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the ranks; the data-parallel size is world size / (tensor x pipeline)."""

    tensor: int = key(1, "tensor-parallel size", low=1)
    pipeline: int = key(1, "pipeline-parallel size; need not divide the number of layers", low=1)
    virtual_pipeline: int = key(1, "model chunks per pipeline stage (interleaved 1F1B schedule)", low=1)
    sequence: bool = key(False, "sequence parallelism in norms and residuals; needs `tensor` above 1")
    world_size: int | None = key(
        None, "number of ranks that `megashear check` plans for; auto: the number of launched ranks", low=1
    )
    distributed_optimizer: bool = key(True, "shard optimizer states over data-parallel ranks")
    recompute: str = key(
        "none", "activation recomputation in the backward pass: none, or full (every layer)", ("none", "full")
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint interval and retention."""

    interval: int = key(200, "steps between checkpoints; one is always saved at the end of a phase", low=1)
    keep: int = key(2, "number of newest checkpoints to keep per phase", low=1)


@dataclass(frozen=True)
class LoggingConfig:
    """Progress, metrics and profiling."""

    interval: int = key(10, "steps between progress lines", low=1)
    tensorboard: bool = key(True, "write TensorBoard events if the package is installed")
    wandb_project: str | None = key(None, "Weights & Biases project to log to; null: off")
    profile_steps: int = key(
        0,
        "steps per phase, from the third on, that rank 0 profiles into `profile/` in the run folder (Chrome trace "
        "format, opens in Perfetto); 0: off; `--profile` sets 3",
        low=0,
    )
    nonfinite_limit: int = key(
        5, "stop the run after this number of consecutive steps skipped for a non-finite loss or gradient", low=1
    )


@dataclass(frozen=True)
class ExportConfig:
    """The exported Hugging Face checkpoint."""

    folder: str | None = key(None, "folder to write; auto: `export` in the run folder")
    dtype: str | None = key(None, "dtype of the exported weights; auto: same as `precision`", ("fp32", "bf16", "fp16"))
    max_shard_gb: float = key(5.0, "maximum size of a safetensors file, in GB (10^9 bytes)", low=0.001)


@dataclass(frozen=True)
class Config:
    """A complete run file."""

    run: RunConfig = key(RunConfig(), "run folder, phases and seed")
    source: SourceConfig = key(SourceConfig(), "the model to start from")
    target: ShapeConfig = key(ShapeConfig(), "the shape to prune to")
    data: DataConfig = key(DataConfig(), "dataset and sequences")
    mixture: MixtureConfig = key(MixtureConfig(), "domain weights and how they follow the losses")
    parallel: ParallelConfig = key(ParallelConfig(), "layout of the ranks")
    precision: str = key(
        "bf16", "bf16 (bf16 weights and matrix products, fp32 master weights and gradients), or fp32", ("bf16", "fp32")
    )
    prune: PruneConfig = key(PruneConfig(), "pruning, with learned masks or in one shot")
    pretrain: PretrainConfig = key(PretrainConfig(), "continued pre-training")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "checkpoint interval and retention")
    logging: LoggingConfig = key(LoggingConfig(), "progress, metrics and profiling")
    export: ExportConfig = key(ExportConfig(), "the exported Hugging Face checkpoint")


ASCENDING = ("paper", "reference")
"""Rules that raise a domain's weight by its excess loss over the reference."""
ADAPTIVE = (*ASCENDING, "ado")
"""Rules that update the weights from the losses."""
