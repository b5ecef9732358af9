"""Generate `docs/config.md` and the recipes' comments from the schema.

A recipe keeps its values; key order and comments come from the schema. To regenerate all of them, run
`python -m megashear.config.config_reference docs/config.md examples/llama*.yaml`.
"""

import sys
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf

from megashear.config import config_keys
from megashear.files.atomic import write_text


def config_markdown() -> str:
    """Return the Markdown reference: one table per section with name, type, default and meaning of each key."""
    lines = [
        "# Run files",
        "",
        "All keys of a run file. This page and the comments in the recipes are generated from the schema in",
        "`megashear/config/` by `python -m megashear.config.config_reference docs/config.md examples/llama*.yaml`.",
        "",
        "The value `auto` selects the derived value that the meaning describes (`null` is accepted too);",
        "elsewhere `null` means none or off.",
        "",
        "Override any key on the command line: `megashear run FILE prune.batch.steps=400`. Values may refer to other",
        "keys and to environment variables: `${run.folder}`, `${oc.env:SCRATCH}`.",
    ]
    section: config_keys.Path | None = None
    for key in config_keys.leaf_keys().values():
        if key.path[:-1] != section:
            section = key.path[:-1]
            title = f"`{'.'.join(section)}`" if section else "Top level"
            meaning = config_keys.sections().get(section, "")
            lines += ["", f"## {title}", *(["", f"{meaning[0].upper()}{meaning[1:]}."] if meaning else []), ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        meaning = key.help.replace("|", "\\|")
        default = _flow(config_keys.written(key.default, key))
        lines.append(f"| `{key.path[-1]}` | {_kind(key)} | `{default}` | {meaning}{_bounds(key)} |")
    return "\n".join(lines) + "\n"


def recipe_text(text: str) -> str:
    """Return a recipe with its initial comment and values, every key of the schema, and each key's meaning above it."""
    tree = OmegaConf.to_container(OmegaConf.create(text))
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    section: config_keys.Path = ()
    for key in config_keys.leaf_keys().values():
        for depth in range(len(key.path) - 1):
            if key.path[: depth + 1] != section[: depth + 1]:
                lines.append(("" if depth else "\n") + "  " * depth + f"{key.path[depth]}:")
        if len(key.path) == 1 and section:
            lines.append("")
        section = key.path[:-1]
        indent = "  " * len(section)
        value = _flow(config_keys.written(_value(tree, key), key))
        lines += [f"{indent}# {key.help}", f"{indent}{key.path[-1]}: {value}"]
    return "\n".join(lines) + "\n"


def _value(tree: Any, key: config_keys.Key) -> Any:
    for part in key.path:
        if not isinstance(tree, dict) or part not in tree:
            return key.default
        tree = tree[part]
    return tree


def _flow(value: Any) -> str:
    """Format a value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, sort_keys=False)
    return text.removesuffix("\n...\n").strip()


def _kind(key: config_keys.Key) -> str:
    kind = _type(key.type)
    if key.is_auto:
        kind = kind.removesuffix("null") + "auto"
    if kind.startswith("text") and key.choices:
        return " or ".join(f"`{word}`" for word in key.choices) + kind.removeprefix("text")
    return kind


def _type(kind: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if get_origin(kind) in (types.UnionType, Union):
        return _type(next(item for item in get_args(kind) if item is not type(None))) + " or null"
    if get_origin(kind) is list:
        return f"list of {_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"mapping of names to {_type(get_args(kind)[1])}s"
    return names[kind]


def _bounds(key: config_keys.Key) -> str:
    parts = [f"at least {key.low:g}"] if key.low is not None else []
    parts += [f"at most {key.high:g}"] if key.high is not None else []
    return f" ({', '.join(parts)})" if parts else ""


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        write_text(path, config_markdown() if path.suffix == ".md" else recipe_text(path.read_text(encoding="utf-8")))
