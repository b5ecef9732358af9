"""Load a run file and overrides as a typed `Config`, and save one.

Later sources take precedence: the schema's defaults, the `paper` preset of the prune section, the file, the overrides.
OmegaConf parses overrides and resolves interpolations (`${run.folder}`, `${oc.env:NAME,default}`); run files cannot
execute code. All unknown keys and wrong values are reported in one error, each with its location.
"""

import functools
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megashear.config import config_keys
from megashear.config.config_keys import convert, near
from megashear.config.presets import PAPER
from megashear.config.schema import Config
from megashear.errors import ConfigError
from megashear.files.atomic import write_text

Leaves = dict[config_keys.Path, Any]


def load_config(path: Path | str | None, overrides: list[str] | None = None) -> Config:
    """Load a config.

    Args:
        path: Run file; None uses the defaults.
        overrides: Overrides such as `prune.batch.steps=400`.

    Raises:
        ConfigError: With every problem and its location (`run.yaml:14` or the override).
    """
    problems: list[str] = []
    values: Leaves = {}
    places: dict[config_keys.Path, str] = {}
    tree, lines = ({}, {}) if path is None else _read_file(Path(path))
    _flatten(tree, (), values, places, lambda at: f"{path}:{lines.get(at, 1)}", problems)
    for text in overrides or []:
        tree = _read_override(text, problems)
        _flatten(tree, (), values, places, lambda _, text=text: f"override {text!r}", problems)
    resolved = _resolve(values, places, problems)
    for at, value in list(resolved.items()):
        try:
            resolved[at] = convert(value, config_keys.leaf_keys()[at])
        except ValueError as wrong:
            problems.append(f"{places.get(at, path)}: {'.'.join(at)} {wrong}")
    if problems:
        raise ConfigError(problems)
    config: Config = _build(Config, resolved, ())
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config or a section to nested plain values, in the schema's order."""
    return asdict(config)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as a run file that loads to the same config (raises StorageError)."""
    tree = to_dict(config)
    for at, one in config_keys.leaf_keys().items():
        section = functools.reduce(dict.__getitem__, at[:-1], tree)
        section[at[-1]] = config_keys.written(section[at[-1]], one)
    write_text(Path(path), OmegaConf.to_yaml(OmegaConf.create(tree)))


def _read_file(path: Path) -> tuple[dict[Any, Any], dict[config_keys.Path, int]]:
    """Return the file's values, with unresolved interpolations, and the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a run file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: is not a mapping of sections such as `run:`")
        lines: dict[config_keys.Path, int] = {}
        _mark_lines(node, (), lines)
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: is not a run file: {_first_line(error)}") from error
    assert isinstance(tree, dict)
    return tree, lines


def _mark_lines(node: yaml.Node, at: config_keys.Path, lines: dict[config_keys.Path, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*at, str(name.value))
            lines[inner] = name.start_mark.line + 1
            if inner in config_keys.sections():
                _mark_lines(value, inner, lines)


def _read_override(text: str, problems: list[str]) -> dict[Any, Any]:
    name, equals, _ = text.partition("=")
    if not equals or not name:
        problems.append(f"override {text!r}: is not of the form key=value, for example run.seed=1")
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        problems.append(f"override {text!r}: cannot be parsed: {_first_line(error)}")
        return {}
    assert isinstance(tree, dict)
    return tree


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _flatten(
    tree: dict[Any, Any],
    at: config_keys.Path,
    values: Leaves,
    places: dict[config_keys.Path, str],
    place: Any,
    problems: list[str],
) -> None:
    """Add the leaves of `tree` to `values`, their locations to `places`, and unknown names to `problems`."""
    for name, value in tree.items():
        path = (*at, str(name))
        dotted = ".".join(path)
        if path in config_keys.leaf_keys():
            values[path], places[path] = value, place(path)
        elif path not in config_keys.sections():
            problems.append(f"{place(path)}: unknown key {dotted}{_suggestion(path)}")
        elif isinstance(value, dict):
            _flatten(value, path, values, places, place, problems)
        elif value is not None:  # an empty section keeps its defaults
            problems.append(f"{place(path)}: {dotted} is {value!r}, expected a section of keys")


def _suggestion(path: config_keys.Path) -> str:
    """Suggest a key: one of the same name in another section, or the nearest name in the same section."""
    same = [key.name for key in config_keys.leaf_keys().values() if key.path[-1] == path[-1]]
    inside = [name for name in same if name.startswith(".".join(path[:-1]))]
    if same:
        return f"; did you mean {(inside or same)[0]}?"
    siblings = {name[len(path) - 1] for name in config_keys.leaf_keys() if name[: len(path) - 1] == path[:-1]}
    return near(path[-1], sorted(siblings))


def _resolve(values: Leaves, places: dict[config_keys.Path, str], problems: list[str]) -> Leaves:
    """Merge defaults, preset and values; resolve interpolations one by one so that each error has its location."""
    paper = values.get(("prune", "preset")) == "paper"
    merged = {
        at: _preset(at) if paper and at in _PAPER_PATHS else key.default for at, key in config_keys.leaf_keys().items()
    }
    merged.update(values)
    tree = OmegaConf.create({})
    for at, value in merged.items():
        try:
            OmegaConf.update(tree, ".".join(at), value, merge=False)
        except (OmegaConfBaseException, ValueError) as error:
            problems.append(f"{places[at]}: {'.'.join(at)}: {_first_line(error)}")
            merged[at] = config_keys.leaf_keys()[at].default
    for at in merged:
        if merged[at] == "???":  # OmegaConf would select null; `convert` reports the placeholder
            continue
        try:
            value = OmegaConf.select(tree, ".".join(at))
            merged[at] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, RecursionError, ValueError) as error:
            problems.append(f"{places.get(at, 'config')}: {'.'.join(at)}: {_first_line(error)}")
            merged[at] = config_keys.leaf_keys()[at].default
    return merged


def _preset(at: config_keys.Path) -> Any:
    value: Any = PAPER
    for part in at[1:]:
        value = value[part]
    return value


_PAPER_PATHS = {
    at
    for at in config_keys.leaf_keys()
    if at[0] == "prune" and at[1] in PAPER and (len(at) == 2 or at[2] in PAPER[at[1]])
}


def _build(cls: Any, values: Leaves, prefix: config_keys.Path) -> Any:
    """Build the section `cls` from the leaves under `prefix`."""
    arguments = {}
    for name, kind in get_type_hints(cls).items():
        at = (*prefix, name)
        arguments[name] = _build(kind, values, at) if is_dataclass(kind) else values[at]
    return cls(**arguments)
