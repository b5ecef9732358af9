"""Every key of a run file, with its type, default and meaning: one frozen dataclass a section.

Key properties: the meaning stands in the field's metadata (`help`), from which `docs/config.md` and the recipes are
made; `null` as a default means "derived", and the meaning says from what. Read next: `load.py`, `check.py`.
"""
# ruff: noqa: RUF009 - `key` makes a dataclass field and the sections are frozen, so nothing mutable is shared

from dataclasses import dataclass, field
from typing import Any

STAGES = ("prune", "finalize", "pretrain", "export")


UNCHANGED = object()
"""Of a key's `before`: runs older than the key computed what its default says."""


def key(
    default: Any,
    meaning: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    before: Any = UNCHANGED,
) -> Any:
    """A config key: default, meaning in one sentence, the words allowed (also as items of a list), inclusive bounds.

    before: the value that stands for what runs older than the key computed, where that is not its default.
    """
    metadata = {"help": meaning, "choices": choices, "low": low, "high": high, "before": before}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and which stages it walks."""

    folder: str = key("runs/default", "folder of the run: checkpoints, logs, results")
    stages: list[str] = key(
        list(STAGES),
        "stages in order, of: prune, finalize, pretrain, export; a stage that is done is not run again",
        STAGES,
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
        "for `rule: schedule`: weights per domain at a stage's start, its end, and at equal distances between if more "
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
class OptimizerConfig:
    """Adam for the weights: one section per training stage."""

    learning_rate: float = key(1e-4, "peak learning rate of the weights", low=0)
    beta1: float = key(0.9, "Adam's first-moment decay", low=0, high=0.9999)
    beta2: float = key(0.95, "Adam's second-moment decay", low=0, high=0.999999)
    eps: float = key(1e-8, "Adam's epsilon", low=1e-20)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    clip_norm: float = key(1.0, "global gradient norm at which gradients are scaled down", low=1e-6)
    schedule: str = key("cosine", "learning rate after warm-up: cosine, or warm-up-stable-decay", ("cosine", "wsd"))
    warmup_steps: int | None = key(
        None, "linear warm-up; null: a tenth of the steps when pruning, 3 % when pre-training", low=0
    )
    decay_steps: int | None = key(None, "length of the decay at the end under `wsd`; null: a fifth of the steps", low=0)
    min_ratio: float = key(0.1, "learning rate at the end as a share of the peak", low=0, high=1)


@dataclass(frozen=True)
class BatchConfig:
    """How long and how wide a training stage is."""

    steps: int = key(3200, "optimizer steps", low=1)
    global_batch: int = key(32, "sequences per step over all ranks", low=1)
    micro_batch: int = key(1, "sequences per rank and forward pass", low=1)
    eval_interval: int = key(50, "steps between held-out evaluations, each followed by an update of the mixture", low=1)
    eval_sequences: int = key(
        32,
        "held-out sequences per domain in an evaluation (fewer where a domain has fewer); with 7 domains the defaults "
        "take less than 5 % of a stage's time",
        low=1,
    )


@dataclass(frozen=True)
class DistillationConfig:
    """The source model as a teacher, beside the language-model loss (off where `weight` is 0)."""

    weight: float = key(
        0.0,
        "share w of the teacher in the loss: (1 - w) x cross entropy + w x KL(teacher, student); 0: no teacher",
        low=0,
        high=1,
    )
    temperature: float = key(
        1.0, "both models' logits are divided by T, and the KL is multiplied by T^2 (Hinton et al. 2015)", low=0.01
    )
    chunk: int = key(
        256,
        "tokens whose logits are in fp32 at a time, on each rank; the result depends on it to rounding alone",
        low=1,
    )


GRANULARITIES = ("hidden", "group", "query", "intermediate", "layer")  # a group: a key/value head with its queries
CRITERIA = ("magnitude", "taylor_mask", "taylor_weight", "fisher", "activation")
LAYER_CRITERIA = ("block_influence", "angular_distance")


@dataclass(frozen=True)
class ImportanceConfig:
    """Scores of the units on calibration text, before pruning."""

    criterion: str | None = key(
        "fisher",
        "score of every unit: magnitude of its weights, first-order Taylor on its mask or on its weights, diagonal "
        "Fisher of its mask, or its activations (Minitron, arXiv 2407.14679); null: none, masks start alike",
        CRITERIA,
        before=None,
    )
    layer_criterion: str | None = key(
        None,
        "score of the layers where it is another; null: `criterion`, block_influence where that is `activation`",
        (*CRITERIA, *LAYER_CRITERIA),
    )
    spread: float = key(
        50.0, "log-alpha at the start under `projected`: units of each row at equal distances over +-spread", low=0
    )
    batches: int = key(16, "calibration batches of `prune.batch.global_batch` sequences, from the mixture", low=2)


@dataclass(frozen=True)
class PruneConfig:
    """Learned masks (Sheared LLaMA, section 2.1)."""

    preset: str | None = key(
        None, "`paper` takes the published choices for every key of this section not set in the file", ("paper",)
    )
    batch: BatchConfig = key(BatchConfig(), "steps and batches")
    optimizer: OptimizerConfig = key(OptimizerConfig(min_ratio=1.0), "Adam for the weights")
    method: str = key(
        "learned",
        "learned masks, or one_shot: the units of the highest `importance` are kept and nothing is trained",
        ("learned", "one_shot"),
    )
    basis: str | None = key(
        None,
        "hidden units: the source's own, or principal directions of its residual stream; null: these where some go",
        ("source", "principal"),
        before="source",
    )
    importance: ImportanceConfig = key(ImportanceConfig(), "scores of the units that masks start from")
    refit: int | None = key(
        None,
        "calibration batches on which one-shot pruning fits the output matrices of what stays to the source by least "
        "squares; 0: none; null: 16 under one_shot",
        low=0,
    )
    distillation: DistillationConfig = key(DistillationConfig(), "the source as teacher")
    constraint: str = key(
        "projected",
        "how expected sparsities come to their targets: projected (log-alpha of each row is shifted onto the scheduled "
        "target after every step), or lagrangian (published: multipliers that ascend)",
        ("projected", "lagrangian"),
        before="lagrangian",
    )
    mask_learning_rate: float | None = key(
        None, "learning rate of log-alpha; null: the published 1.0 x steps / 3200, at most 1.0", low=0
    )
    lambda_learning_rate: float | None = key(
        None,
        "learning rate of the Lagrange multipliers (ascent); null: the published 1.0 x 3200 / steps, at least 1.0, so "
        "that they can grow as far in a shorter stage",
        low=0,
    )
    sparsity_warmup_steps: int | None = key(
        None, "steps over which targets grow; null: a fifth of the steps, under `projected` a half", low=0
    )
    closing: list[str] | None = key(
        None,
        "order in which granularities close one after another, each over an equal part of the sparsity warm-up; those "
        "left out come last; null: all together",
        GRANULARITIES,
    )
    sharpening: float = key(
        10.0,
        "factor by which log-alpha grows, evenly over the steps until masks settle, as a temperature that anneals: "
        "fewer and fewer units stay undecided, and the noise leaves the others alone; 1: none, as published",
        low=1,
        before=1.0,
    )
    settle_steps: int | None = key(
        None,
        "last steps of the stage in which masks stand fixed at the target's shape, exactly 0 or 1; 0: none, as "
        "published; null: a tenth of the steps, one at least",
        low=0,
        before=0,
    )
    granularities: list[str] | None = key(
        None,
        "masks to learn, of: hidden, group (a key/value head with its query heads), query, intermediate, layer; "
        "null: those that shrink",
        GRANULARITIES,
    )
    log_alpha_init: float = key(5.0, "mean of log-alpha at the start, before the limit (standard deviation 0.01)")
    log_alpha_limit: float | None = key(
        4.605170185988092, "log-alpha stays within +-limit under `lagrangian`; published: ln 100; null: none", low=0.1
    )
    lambda1_cap: float | None = key(None, "largest linear multiplier; null: none, as published", low=0)
    lambda2_cap: float | None = key(None, "largest quadratic multiplier; null: none, as published", low=0)
    live_units: bool = key(
        True, "leave units whose mask is 0 out of every product: exact to rounding; false computes everything"
    )
    clip: str = key(
        "weights", "gradient clipping: one norm over the weights, or over masks and multipliers too (joint, published)",
        ("weights", "joint"),
    )
    masking: str = key(
        "exact", "exact: masked equals pruned; published: the embedding is not masked", ("exact", "published")
    )


@dataclass(frozen=True)
class PretrainConfig:
    """Continued pre-training, or pre-training from scratch."""

    batch: BatchConfig = key(
        BatchConfig(steps=48000, global_batch=256, eval_interval=400, eval_sequences=64), "steps and batches"
    )
    optimizer: OptimizerConfig = key(OptimizerConfig(), "Adam for the weights")
    distillation: DistillationConfig = key(DistillationConfig(), "the source as teacher")
    moments: str = key(
        "pruned",
        "Adam's moments at the start: pruned (those of pruning, cut with the model, where its masks settled and both "
        "stages have the same loss), or fresh",
        ("pruned", "fresh"),
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved."""

    interval: int = key(200, "steps between checkpoints; one is always saved at a stage's end", low=1)
    keep: int = key(2, "newest checkpoints kept per stage", low=1)


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    interval: int = key(10, "steps between progress lines", low=1)
    tensorboard: bool = key(True, "write TensorBoard events where the package is installed")
    wandb_project: str | None = key(None, "Weights & Biases project; null: off")
    profile_steps: int = key(
        0,
        "steps of a stage, from the third on, that rank 0 traces to `profile/` in the run's folder (Chrome's format, "
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

    run: RunConfig = key(RunConfig(), "where a run lives and which stages it walks")
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
