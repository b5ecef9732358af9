"""Warnings for config keys that have no effect in this run. Reported by `check` and at start-up, never an error."""

from dataclasses import asdict
from typing import Any

from megashear.config.model_shape import ModelShape
from megashear.config.presets import PAPER
from megashear.config.resolve import distillation_plans, frozen_steps, training_phases
from megashear.config.schema import Config
from megashear.config.shape_legality import granularity_sizes
from megashear.config.training_schema import DistillationConfig, OptimizerConfig, PruneConfig

LAGRANGIAN_STEPS = 100
"""Steps below which multipliers may leave masks more than a percent off their targets."""
MULTIPLIERS = ("lambda_learning_rate", "lambda1_cap", "lambda2_cap")
PROJECTED = (*MULTIPLIERS, "log_alpha_init", "log_alpha_limit")
"""Keys of `prune` that are not read where expected sparsities are projected."""
ONE_SHOT = (
    *PROJECTED,
    "granularity_order",
    "freeze_steps",
    "sparsity_warmup_steps",
    "mask_learning_rate",
    "sharpening",
    "importance.spread",
    "distillation.temperature",
    "distillation.chunk",
    "distillation.stop_when",
    "clip",
    "live_units",
    "batch.steps",
    "batch.eval_interval",
    *(f"optimizer.{name}" for name in OptimizerConfig.__dataclass_fields__),
)
"""Keys of `prune` that are not read where nothing is trained before the cut."""


def pruning_warnings(config: Config, source: ModelShape, target: ModelShape) -> list[str]:
    """Warnings for keys of `prune` without effect, in a run that prunes."""
    prune, warnings = config.prune, []
    if "prune" not in config.run.phases:
        return []
    layer = prune.importance.layer_criterion
    if layer is not None and source.num_layers == target.num_layers:
        warnings.append(
            f"prune.importance.layer_criterion: {layer} has no effect: all {source.num_layers} layers are kept"
        )
    if prune.method == "one_shot":
        warnings += [f"prune.{key}: has no effect with prune.method: one_shot" for key in changed(prune, ONE_SHOT)]
        return warnings + _unused_weight(config)
    if prune.refit is not None:
        warnings.append("prune.refit: has no effect with prune.method: learned, which trains all weights")
    if prune.constraint == "lagrangian" and prune.batch.steps < LAGRANGIAN_STEPS:
        warnings.append(
            f"prune.constraint: lagrangian in {prune.batch.steps} steps: multipliers need some {LAGRANGIAN_STEPS} to "
            "bring masks to their targets; `projected` has them there at every step"
        )
    unused = PROJECTED if prune.constraint == "projected" else ("importance.spread",)
    warnings += [
        f"prune.{key}: has no effect with prune.constraint: {prune.constraint}" for key in changed(prune, unused)
    ]
    if prune.constraint == "lagrangian" and prune.importance.criterion is not None:
        warnings += [
            f"prune.{key}: has no effect if masks start from importance.criterion"
            for key in changed(prune, ("log_alpha_init",))
        ]
    sizes = granularity_sizes(source, target)
    for key, names in (("granularity_order", prune.granularity_order), ("granularities", prune.granularities)):
        if key == "granularities" and (prune.constraint != "projected" or names == PAPER["granularities"]):
            continue  # multipliers close some of what stays; the published list is as good as unset
        stay = [name for name in names or [] if name not in sizes or sizes[name][0] == sizes[name][1]]
        warnings += [f"prune.{key}: {name} has no effect: the target keeps all of its units" for name in stay]
    return warnings


def moments_warnings(config: Config) -> list[str]:
    """Warnings for `pretrain.moments: fresh` in runs that have no other moments."""
    prune, phases = config.prune, config.run.phases
    if config.pretrain.moments != "fresh" or "pretrain" not in phases:
        return []
    if "prune" in phases and prune.method == "learned" and frozen_steps(prune):
        return []
    return ["pretrain.moments: fresh has no effect: pruning passes moments on only if its masks are frozen"]


def _unused_weight(config: Config) -> list[str]:
    """Warning for a teacher weight under one-shot pruning that pre-training does not inherit."""
    followed = "pretrain" in config.run.phases and config.pretrain.distillation.weight is None
    if followed or not config.prune.distillation.weight:
        return []
    return ["prune.distillation.weight: has no effect with prune.method: one_shot"]


def changed(prune: PruneConfig, keys: tuple[str, ...]) -> list[str]:
    """Keys that are set to neither the default nor the published value (recipes list all keys)."""
    found, plain = asdict(prune), asdict(PruneConfig())
    return [key for key in keys if _at(found, key) not in (_at(plain, key), _at(PAPER, key))]


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def distillation_warnings(config: Config, source: ModelShape | None, target: ModelShape | None) -> list[str]:
    """Warnings for a teacher equal to the initial model, and for distillation keys without a teacher."""
    warnings, plain, taught = [], vars(DistillationConfig()), distillation_plans(config, source, target)
    published = PAPER["distillation"] if config.prune.preset == "paper" else plain
    for name, phase in training_phases(config).items():
        if taught[name].weight or (phase.distillation.weight is None and None in (source, target)):
            continue
        warnings += [
            f"{name}.distillation.{key}: has no effect while {name}.distillation.weight is 0"
            for key in ("temperature", "chunk", "stop_when")
            if getattr(phase.distillation, key) not in (plain[key], published[key])
        ]
    weight, phases = config.pretrain.distillation.weight, config.run.phases
    if not weight or "pretrain" not in phases or {"prune", "finalize"} & set(phases) or config.source.folder is None:
        return warnings
    comes = (
        "holds it there at the cost of its forward passes; set it to 0"
        if config.pretrain.distillation.stop_when == "end"
        else "stops after the first steps, once the student is better: it changes next to nothing"
    )
    return [
        *warnings,
        f"pretrain.distillation.weight: {weight:g} in a run that does not prune: the teacher is source.folder, the "
        f"very model that training starts from, and {comes}",
    ]
