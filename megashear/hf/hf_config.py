"""Convert between Hugging Face's config.json and ModelShape, for every LLaMA generation.

Defaults are those of transformers' LlamaConfig. Unsupported settings are refused, all at once. Written files are read
alike by transformers 4.45 and later (rope_theta, rope_scaling, torch_dtype) and by 5 (rope_parameters, dtype).
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megashear.config.model_shape import ModelShape, RopeScaling
from megashear.errors import ModelError

NAME = "config.json"
ARCHITECTURE = "LlamaForCausalLM"

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# Keys whose other values change what the model computes, with the value that we carry.
_CARRIED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
# Keys of a source that would be untrue of what we write, or that no loader needs.
_DROPPED = ("_name_or_path", "quantization_config", "transformers_version", "pretraining_tp", "auto_map")


def read_config(folder: Path) -> dict[str, Any]:
    """Read `folder`/config.json. Raises ModelError if it is missing or not a JSON object."""
    path = Path(folder) / NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: not found; a model folder holds config.json, tokenizer files and safetensors"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); download or make the folder again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object; download or make the folder again")
    return config


def shape_of_config(config: dict[str, Any], where: Path) -> ModelShape:
    """Shape described by a config.json; `where` is its path for messages.

    Raises:
        ModelError: Sizes are missing or impossible, or features are not supported; one line per problem.
    """
    problems = _unsupported(config)
    sizes: dict[str, Any] = {key: config.get(key) for key in _SIZES}
    heads = sizes["num_attention_heads"]
    sizes["max_position_embeddings"] = config.get("max_position_embeddings", config.get("max_sequence_length", 2048))
    sizes["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    bad = [key for key, value in sizes.items() if not _is_count(value)]
    problems += [f"{key} is {config.get(key)!r}, not a whole number above 0" for key in bad]
    theta, scaling = _rope(config, problems)
    norm_eps = _positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", problems)
    head_dim = 0 if bad else _head_dim(config, sizes, problems)
    if problems:
        lines = "\n".join(f"{where}: {problem}" for problem in problems)
        raise ModelError(f"{lines}\nuse a LLaMA model that has none of this; megashear carries plain LLaMA 1 to 3")
    return ModelShape(
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_query_groups=sizes["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=norm_eps,
        max_position_embeddings=sizes["max_position_embeddings"],
    )


def config_of_shape(shape: ModelShape, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model of this shape.

    Args:
        shape: Shape of the model.
        dtype: Dtype as torch names it ("bfloat16").
        base: Config of the source; its token ids and other keys are kept.
    """
    scaling = {"rope_type": "llama3", **asdict(shape.rope_scaling)} if shape.rope_scaling else None
    rope = {"rope_theta": shape.rope_theta, **(scaling or {"rope_type": "default"})}
    kept = {key: value for key, value in (base or {}).items() if key not in _DROPPED}
    return {
        **kept,
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = []
    architectures = config.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE] or config.get("model_type", "llama") != "llama":
        problems.append(f"architecture {architectures}, model_type {config.get('model_type')!r} is not {ARCHITECTURE}")
    for key, value in _CARRIED.items():
        if config.get(key, value) not in (value, None):
            problems.append(f"{key} is {config[key]!r}; only {value!r} is carried")
    if config.get("quantization_config") is not None:
        problems.append("quantization_config: the weights are quantised; take the unquantised model")
    return problems


def _rope(config: dict[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies; rope_scaling takes precedence, as in transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_scaling is {rope!r}, not an object")
        return 10000.0, None
    theta = _positive(rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta", problems)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is carried")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        problems.append(f"rope_type {kind!r}; only 'default' and 'llama3' are carried")
        return theta, None
    factors = [
        _positive(rope.get(key), f"rope_scaling.{key}", problems)
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    ]
    original: Any = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    if not _is_count(original):
        problems.append(f"rope_scaling.original_max_position_embeddings is {original!r}, not a whole number above 0")
        return theta, None
    return theta, RopeScaling(factors[0], factors[1], factors[2], original)


def _head_dim(config: dict[str, Any], sizes: dict[str, int], problems: list[str]) -> int:
    hidden, heads, groups = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % groups:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    head_dim: int | None = config.get("head_dim")
    if head_dim is None:
        head_dim = hidden // heads
        if hidden % heads:
            problems.append(
                f"head_dim is not given and hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )
    if not _is_count(head_dim) or head_dim % 2:
        problems.append(f"head_dim {head_dim!r} is not an even number above 0")
    return head_dim


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: Any, key: str, problems: list[str]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        problems.append(f"{key} is {value!r}, not a number above 0")
        return 1.0
    return float(value)
