"""Keys of the training phases, `prune` and `pretrain`: batches, optimizer, distillation, importance scores, masks.

`resolve.py` derives the value of unset keys; `presets.py` holds the published values.
"""
# ruff: noqa: RUF009 - `key` returns a dataclass field and the sections are frozen, so nothing mutable is shared

from dataclasses import dataclass

from megashear.config.field import key


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for the weights; one section per training phase."""

    learning_rate: float | None = key(
        None, "peak learning rate of the weights; auto: 1e-4 x 2560 / hidden size of the model being trained", low=0
    )
    beta1: float = key(0.9, "decay rate of Adam's first moment", low=0, high=0.9999)
    beta2: float = key(0.95, "decay rate of Adam's second moment", low=0, high=0.999999)
    eps: float = key(1e-8, "Adam's epsilon", low=1e-20)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    clip_norm: float = key(1.0, "maximum global gradient norm; larger gradients are scaled down to it", low=1e-6)
    schedule: str = key(
        "cosine",
        "learning rate schedule after warm-up: cosine decay, or wsd (warm-up, stable, decay)",
        ("cosine", "wsd"),
    )
    warmup_steps: int | None = key(
        None, "linear learning rate warm-up, in steps; auto: 10 % of the steps in `prune`, 3 % in `pretrain`", low=0
    )
    decay_steps: int | None = key(
        None, "final decay under `schedule: wsd`, in steps; auto: 20 % of the steps, at most those after warm-up", low=0
    )
    min_ratio: float = key(0.1, "final learning rate as a fraction of the peak", low=0, high=1)


@dataclass(frozen=True)
class BatchConfig:
    """Length and batch size of a training phase."""

    steps: int = key(3200, "number of optimizer steps", low=1)
    global_batch: int = key(32, "sequences per step, over all ranks", low=1)
    micro_batch: int = key(1, "sequences per forward pass on each data-parallel rank", low=1)
    eval_interval: int = key(50, "steps between held-out evaluations; each also updates the domain weights", low=1)
    eval_sequences: int = key(
        32, "held-out sequences per domain and evaluation; a domain with fewer uses all it has", low=1
    )


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation from the source model, added to the language-model loss; off if `weight` is 0."""

    weight: float | None = key(
        None,
        "weight w in the loss (1 - w) x cross entropy + w x KL(teacher, student); 0: no distillation; auto: 0.5 "
        "in runs that prune if the source's forward pass costs at most the FLOPs of training the target and the source "
        "is not known to have seen at most as many tokens as the run trains on, else 0, decided at the first start; in "
        "`pretrain` the weight of `prune`",
        low=0,
        high=1,
    )
    temperature: float = key(
        1.0, "temperature T: both models' logits are divided by T and the KL is multiplied by T^2", low=0.01
    )
    chunk: int = key(
        256,
        "tokens per rank whose logits are held in fp32 at a time; affects memory, and results only by rounding",
        low=1,
    )
    stop_when: str = key(
        "student_better",
        "when distillation stops: student_better (the student's loss over 8 steps is at most the teacher's; in pruning "
        "only after sparsities reach half their targets), or end (at the end of the phase)",
        ("student_better", "end"),
    )


GRANULARITIES = ("hidden", "group", "query", "intermediate", "layer")
"""What masks can prune; a group is a key/value head with its query heads."""
CRITERIA = ("magnitude", "taylor_mask", "taylor_weight", "fisher", "activation")
LAYER_CRITERIA = ("block_influence", "angular_distance")


@dataclass(frozen=True)
class ImportanceConfig:
    """Importance scores, computed on calibration text before pruning."""

    criterion: str | None = key(
        "fisher",
        "importance score: weight magnitude, first-order Taylor on masks or on weights, diagonal Fisher of masks, or "
        "activations (Minitron, arXiv 2407.14679); null: no scores, all masks start alike",
        CRITERIA,
    )
    layer_criterion: str | None = key(
        None,
        "importance score of whole layers; auto: same as `criterion`, but block_influence if that is `activation`",
        (*CRITERIA, *LAYER_CRITERIA),
    )
    spread: float = key(
        50.0,
        "under `projected`, initial log-alpha of a row's units is spaced evenly in [-spread, spread], ranked by score",
        low=0.1,
    )
    batches: int = key(16, "calibration batches of `prune.batch.global_batch` sequences, drawn from the mixture", low=2)


@dataclass(frozen=True)
class PruneConfig:
    """Pruning with learned masks (Sheared LLaMA, section 2.1) or by importance scores."""

    preset: str | None = key(
        None,
        "`paper`: use the published value for every key of this section that the run file does not set",
        ("paper",),
    )
    batch: BatchConfig = key(BatchConfig(), "number of steps and batch sizes")
    optimizer: OptimizerConfig = key(OptimizerConfig(min_ratio=1.0), "Adam for the weights")
    method: str = key(
        "learned",
        "learned: train masks; one_shot: keep the units with the highest `importance` scores, without training",
        ("learned", "one_shot"),
    )
    basis: str | None = key(
        None,
        "hidden dimensions to prune: the source's own, or principal directions of its residual stream; auto: principal "
        "if the target has a smaller hidden size, else source",
        ("source", "principal"),
    )
    importance: ImportanceConfig = key(ImportanceConfig(), "scores that order the units before pruning")
    refit: int | None = key(
        None,
        "calibration batches for refitting output matrices to the source by least squares, under `one_shot` only; 0: "
        "no refit; auto: 16 under `one_shot`",
        low=0,
    )
    distillation: DistillationConfig = key(DistillationConfig(), "distillation from the source model")
    constraint: str = key(
        "projected",
        "how masks reach their target sparsity: projected (shift each row's log-alpha onto the scheduled sparsity "
        "after every step), or lagrangian (learned multipliers, as published)",
        ("projected", "lagrangian"),
    )
    mask_learning_rate: float | None = key(
        None,
        "learning rate of log-alpha; auto: steps / 3200 (under `lagrangian` at least 16 x log_alpha_limit / steps), at "
        "most 1.0",
        low=0,
    )
    lambda_learning_rate: float | None = key(
        None, "learning rate of the Lagrange multipliers; auto: 3200 / steps, at least 1.0", low=0
    )
    sparsity_warmup_steps: int | None = key(
        None,
        "steps over which the target sparsities grow from 0; auto: 50 % of the steps under `projected`, 20 % under "
        "`lagrangian`, at most those before masks are frozen",
        low=0,
    )
    granularity_order: list[str] | None = key(
        None,
        "order in which granularities are pruned one after another, in equal parts of the sparsity warm-up; unlisted "
        "ones come last; auto: all at the same time",
        GRANULARITIES,
    )
    sharpening: float = key(
        10.0,
        "factor by which log-alpha is scaled up, evenly over the steps before masks are frozen, so that fewer masks "
        "stay between 0 and 1; 1: no scaling, as published",
        low=1,
    )
    freeze_steps: int | None = key(
        None,
        "final steps of the phase with frozen masks, exactly 0 or 1 at the target shape; 0: never frozen, as "
        "published; auto: 10 % of the steps, at least 1, at most those after the sparsity warm-up",
        low=0,
    )
    granularities: list[str] | None = key(
        None,
        "masks to learn, any of: hidden, group (a key/value head with its query heads), query, intermediate, layer; "
        "auto: those whose size differs between source and target",
        GRANULARITIES,
    )
    log_alpha_init: float = key(
        5.0, "mean initial log-alpha (standard deviation 0.01) if masks start alike, clamped to `log_alpha_limit`"
    )
    log_alpha_limit: float | None = key(
        4.605170185988092,
        "bound on the absolute value of log-alpha, under `lagrangian` only; default ln 100, as published; null: none",
        low=0.1,
    )
    lambda1_cap: float | None = key(
        1.0, "bound on the absolute value of the linear multiplier, against overshoot; null: none, as published", low=0
    )
    lambda2_cap: float | None = key(None, "upper bound of the quadratic multiplier; null: none, as published", low=0)
    live_units: bool = key(
        True, "skip units whose mask is 0 in every matrix product; same results up to rounding, and faster"
    )
    clip: str = key(
        "weights",
        "gradients in the norm for clipping: weights only, or joint (weights, masks and multipliers, as published)",
        ("weights", "joint"),
    )
    masking: str = key(
        "exact",
        "exact: the masked model computes what the pruned one does; published: the embedding is not masked",
        ("exact", "published"),
    )


@dataclass(frozen=True)
class PretrainConfig:
    """Continued pre-training, or pre-training from scratch."""

    batch: BatchConfig = key(
        BatchConfig(steps=48000, global_batch=256, eval_interval=400, eval_sequences=64),
        "number of steps and batch sizes",
    )
    optimizer: OptimizerConfig = key(OptimizerConfig(), "Adam for the weights")
    distillation: DistillationConfig = key(DistillationConfig(), "distillation from the source model")
    moments: str = key(
        "pruned",
        "Adam's initial moments: pruned (taken from pruning and cut to the target shape, if its masks were frozen), or "
        "fresh (zero)",
        ("pruned", "fresh"),
    )
