"""Named model shapes, the `paper` preset, and the resolution of a `ShapeConfig` to a `ModelShape`.

Shapes are those of the published models (Hugging Face `config.json`); `sheared-*` are the targets of Sheared LLaMA,
table 1. `PAPER` holds the values of `prune.preset: paper`, from Sheared LLaMA (arXiv 2310.06694), section 2.1 and
appendix A, and from its published implementation. It does not set the micro-batch, which depends on the layout.
"""

import difflib
import math
from dataclasses import fields
from typing import Any

from megashear.config.model_shape import ModelShape, RopeScaling
from megashear.config.schema import ShapeConfig
from megashear.config.shape_legality import self_problems
from megashear.errors import ConfigError

PRESETS: dict[str, ModelShape] = {
    "llama2-13b": ModelShape(5120, 40, 40, 40, 128, 13824, 32000),
    "llama2-7b": ModelShape(4096, 32, 32, 32, 128, 11008, 32000),
    "sheared-2.7b": ModelShape(2560, 32, 20, 20, 128, 6912, 32000),
    "sheared-1.3b": ModelShape(2048, 24, 16, 16, 128, 5504, 32000),
    "llama3.1-70b": ModelShape(
        8192, 80, 64, 8, 128, 28672, 128256, False, 500000.0, RopeScaling(), max_position_embeddings=131072
    ),
    "llama3-8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256, False, 500000.0, max_position_embeddings=8192),
    # A target for llama3-8b, 4.0 billion parameters: 3 of 4 query heads in each of all 8 groups.
    "llama3-4b": ModelShape(3072, 32, 24, 8, 128, 8192, 128256, False, 500000.0, max_position_embeddings=8192),
    "llama3.2-3b": ModelShape(
        3072, 28, 24, 8, 128, 8192, 128256, True, 500000.0, RopeScaling(factor=32.0), max_position_embeddings=131072
    ),
    "llama3.2-1b": ModelShape(
        2048, 16, 32, 8, 64, 8192, 128256, True, 500000.0, RopeScaling(factor=32.0), max_position_embeddings=131072
    ),
    "smollm2-135m": ModelShape(576, 30, 9, 3, 64, 1536, 49152, True, 100000.0, max_position_embeddings=8192),
}

PRUNED = ("hidden_size", "num_layers", "num_heads", "num_query_groups", "intermediate_size")


def preset(name: str) -> ModelShape:
    """Return the shape of that name.

    Raises:
        ConfigError: If no shape has this name; the message suggests the nearest names.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
    raise ConfigError(f"preset: no shape is called {name!r}; {hint}")


def resolve_shape(
    config: ShapeConfig, source: ModelShape | None, vocab_size: int | None = None, section: str | None = None
) -> ModelShape:
    """Resolve a shape section to a model shape.

    A target takes hidden size, layers, heads, groups and intermediate size from the keys, then the preset, then the
    source. It takes everything else from the keys or the source. A shape without a source uses keys, then the preset.

    Args:
        config: The shape section.
        source: Model that the target is cut from; None for a shape without a source.
        vocab_size: Vocabulary size of the dataset; precedes the preset's if there is no source.
        section: Name of the section in messages; default `target`, or `source.shape` without a source.

    Raises:
        ConfigError: With every problem: unknown preset, missing sizes, heads that fit no number of groups.
    """
    section = section or ("source.shape" if source is None else "target")
    base: ModelShape | None = None
    if config.preset is not None:
        try:
            base = preset(config.preset)
        except ConfigError as error:
            raise ConfigError([f"{section}.{problem}" for problem in error.problems]) from None
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "preset"}
    if source is None:
        return _without_source({name: v for name, v in given.items() if v is not None}, base, vocab_size, section)
    return _target_from(source, given, base, section)


def _target_from(source: ModelShape, given: dict[str, Any], base: ModelShape | None, section: str) -> ModelShape:
    """Resolve a target: pruned sizes from keys, preset or source, the rest from keys or source."""
    sizes = {f.name: getattr(source, f.name) for f in fields(source)}
    if base is not None:
        sizes |= {name: getattr(base, name) for name in PRUNED}
    sizes |= {name: value for name, value in given.items() if value is not None}
    problems: list[str] = []
    if given["num_query_groups"] is None and (base is None or given["num_heads"] is not None):
        sizes["num_query_groups"] = _groups(source, sizes["num_heads"], section, problems)
    return _checked(sizes, section, problems)


def _groups(source: ModelShape, heads: int, section: str, problems: list[str]) -> int:
    """Derive the number of groups: keep the source's heads per group, or else its groups."""
    queries, groups = source.queries_per_group, source.num_query_groups
    if heads % queries == 0:
        return heads // queries
    if heads % groups == 0 and heads // groups <= queries:
        return groups
    below = heads // queries * queries
    choice = " or ".join(str(near) for near in (below, below + queries) if 0 < near <= source.num_heads)
    problems.append(
        f"{section}.num_heads: {heads} heads fill neither groups of {queries} nor {groups} groups, as the source has "
        f"them; use {choice}, or set {section}.num_query_groups"
    )
    return groups


def _without_source(given: dict[str, Any], base: ModelShape | None, vocab_size: int | None, section: str) -> ModelShape:
    """Resolve a shape without a source: keys, then sizes derived from them, then the preset."""
    sizes = {} if base is None else {f.name: getattr(base, f.name) for f in fields(base)}
    if vocab_size is not None:
        sizes["vocab_size"] = vocab_size
    sizes |= given
    required = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
    problems = [f"{section}.{name}: missing; give a size, or a preset" for name in required if name not in sizes]
    if problems:
        raise ConfigError(problems)
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    if "num_query_groups" not in given and (base is None or "num_heads" in given):
        # Keep the preset's query heads per group when the number of heads changes.
        queries = 1 if base is None else base.queries_per_group
        sizes["num_query_groups"] = heads // queries if heads % queries == 0 else heads
    if "head_dim" not in sizes:
        if heads < 1 or hidden % heads:
            raise ConfigError(
                f"{section}.head_dim: missing, and hidden_size {hidden} / num_heads {heads} is no whole number; give it"
            )
        sizes["head_dim"] = hidden // heads
    return _checked(sizes, section, problems)


def _checked(sizes: dict[str, Any], section: str, problems: list[str]) -> ModelShape:
    """Return the shape, or raise ConfigError with `problems` and those of the sizes."""
    shape = ModelShape(**sizes)
    problems = problems + self_problems(shape, section)
    for name in ("norm_eps", "rope_theta", "max_position_embeddings"):
        if getattr(shape, name) <= 0:
            problems.append(f"{section}.{name}: {getattr(shape, name)} must be positive")
    if problems:
        raise ConfigError(problems)
    return shape


PAPER: dict[str, Any] = {
    "batch": {"steps": 3200, "global_batch": 32, "eval_interval": 50, "eval_sequences": 500},
    "optimizer": {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "schedule": "cosine",
        "warmup_steps": 320,
        "decay_steps": None,
        "min_ratio": 0.1,
    },
    "method": "learned",
    "basis": "source",
    "importance": {"criterion": None, "layer_criterion": None, "spread": 5.0, "batches": 16},
    "refit": None,  # one-shot pruning only
    "distillation": {"weight": 0.0, "temperature": 1.0, "stop_when": "end", "chunk": 256},
    "constraint": "lagrangian",
    "mask_learning_rate": 1.0,
    "lambda_learning_rate": 1.0,
    "sparsity_warmup_steps": 640,
    "granularity_order": None,
    "sharpening": 1.0,
    "freeze_steps": 0,
    # the published code has no grouped queries, so "group" is a head
    "granularities": ["hidden", "group", "intermediate", "layer"],
    "log_alpha_init": 5.0,
    "log_alpha_limit": math.log(100.0),
    "lambda1_cap": None,
    "lambda2_cap": None,
    "live_units": True,  # the published code computes all units; only rounding differs
    "clip": "joint",
    "masking": "published",
}
