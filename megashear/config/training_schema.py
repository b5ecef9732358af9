"""The keys of the phases that train, `prune` and `pretrain`: batches, optimizer, teacher, scores and masks.

Read next: `schema.py` (the other sections), `phases.py` (what null stands for), `paper.py` (the published values).
"""
# ruff: noqa: RUF009 - `key` makes a dataclass field and the sections are frozen, so nothing mutable is shared

from dataclasses import dataclass

from megashear.config.field import key


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for the weights: one section per training phase."""

    learning_rate: float | None = key(
        None,
        "peak learning rate of the weights; null: the published 1e-4 x 2560 / hidden size of the model that is made",
        low=0,
    )
    beta1: float = key(0.9, "Adam's first-moment decay", low=0, high=0.9999)
    beta2: float = key(0.95, "Adam's second-moment decay", low=0, high=0.999999)
    eps: float = key(1e-8, "Adam's epsilon", low=1e-20)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    clip_norm: float = key(1.0, "global gradient norm at which gradients are scaled down", low=1e-6)
    schedule: str = key("cosine", "learning rate after warm-up: cosine, or warm-up-stable-decay", ("cosine", "wsd"))
    warmup_steps: int | None = key(
        None, "linear warm-up; null: a tenth of the steps when pruning, 3 % when pre-training", low=0
    )
    decay_steps: int | None = key(
        None, "length of the decay at the end under `wsd`; null: a fifth of the steps or what warm-up leaves", low=0
    )
    min_ratio: float = key(0.1, "learning rate at the end as a share of the peak", low=0, high=1)


@dataclass(frozen=True)
class BatchConfig:
    """How long and how wide a training phase is."""

    steps: int = key(3200, "optimizer steps", low=1)
    global_batch: int = key(32, "sequences per step over all ranks", low=1)
    micro_batch: int = key(1, "sequences per rank and forward pass", low=1)
    eval_interval: int = key(50, "steps between held-out evaluations, each followed by an update of the mixture", low=1)
    eval_sequences: int = key(
        32,
        "held-out sequences per domain in an evaluation (fewer where a domain has fewer); with 7 domains the defaults "
        "take less than 5 % of a phase's time",
        low=1,
    )


@dataclass(frozen=True)
class DistillationConfig:
    """The source model as a teacher, beside the language-model loss (off where `weight` is 0)."""

    weight: float | None = key(
        None,
        "share w of the teacher in the loss: (1 - w) x cross entropy + w x KL(teacher, student); 0: no teacher; null: "
        "0.5 in runs that prune, where the source's forward pass takes no more FLOPs than training the target, and the "
        "source is not known to have been trained on as few tokens as the run takes or fewer, else 0, settled when the "
        "run first starts; in `pretrain` null is what `prune` has, by either method",
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
    until: str = key(
        "outgrown",
        "when the teacher goes: outgrown (once the model's loss is not above the source's on the text of the last 8 "
        "steps; in pruning from half of the target sparsities on), or end (of the phase)",
        ("outgrown", "end"),
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
    )
    layer_criterion: str | None = key(
        None,
        "score of the layers where it is another; null: `criterion`, block_influence where that is `activation`",
        (*CRITERIA, *LAYER_CRITERIA),
    )
    spread: float = key(
        50.0, "log-alpha at the start under `projected`: units of each row at equal distances over +-spread", low=0.1
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
    )
    mask_learning_rate: float | None = key(
        None,
        "learning rate of log-alpha; null: the published 1.0 x steps / 3200, under `lagrangian` no less than 16 x "
        "log_alpha_limit / steps (multipliers have to bring units from one limit to the other), at most 1.0",
        low=0,
    )
    lambda_learning_rate: float | None = key(
        None,
        "learning rate of the Lagrange multipliers (ascent); null: the published 1.0 x 3200 / steps, at least 1.0, so "
        "that they can grow as far in a shorter phase",
        low=0,
    )
    sparsity_warmup_steps: int | None = key(
        None,
        "steps over which targets grow; null: a fifth of the steps, under `projected` a half, or what settling leaves",
        low=0,
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
    )
    settle_steps: int | None = key(
        None,
        "last steps of the phase in which masks stand fixed at the target's shape, exactly 0 or 1; 0: none, as "
        "published; null: a tenth of the steps or what the sparsity warm-up leaves, one at least",
        low=0,
    )
    granularities: list[str] | None = key(
        None,
        "masks to learn, of: hidden, group (a key/value head with its query heads), query, intermediate, layer; "
        "null: those that shrink",
        GRANULARITIES,
    )
    log_alpha_init: float = key(
        5.0, "mean of log-alpha at the start, before the limit (standard deviation 0.01), where masks start alike"
    )
    log_alpha_limit: float | None = key(
        4.605170185988092, "log-alpha stays within +-limit under `lagrangian`; published: ln 100; null: none", low=0.1
    )
    lambda1_cap: float | None = key(
        1.0,
        "largest size of the linear multiplier, of either sign: without one it has to come back as far as it went, and "
        "masks overshoot; null: none, as published",
        low=0,
    )
    lambda2_cap: float | None = key(
        None,
        "largest quadratic multiplier, which brakes where masks overshoot; null: none, as published",
        low=0,
    )
    live_units: bool = key(
        True, "leave units whose mask is 0 out of every product: exact to rounding; false computes everything"
    )
    clip: str = key(
        "weights",
        "gradient clipping: one norm over the weights, or over masks and multipliers too (joint, published)",
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
        "Adam's moments at the start: pruned (those of pruning, cut with the model, where its masks settled), or fresh",
        ("pruned", "fresh"),
    )
