"""Reference losses of the domains: a list typed in, a scaling law's prediction at the target's size, or the source
model's own.

Three providers behind one call. Read next: `scaling_law.py` (the fit), `mixture.py` (what references are for).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from megashear.config.mixture import ASCENDING
from megashear.config.schema import MixtureConfig
from megashear.errors import ConfigError, DataError


def reference_losses(
    config: MixtureConfig, names: list[str], source_losses: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Reference loss of every domain in nats per token, in the order of `names`, from the config's provider.

    source_losses: the source model's held-out losses, for `references: source`. Rules that follow none
    (`static`, `schedule`, `ado`) need none: {}.
    Raises ConfigError (a key that is missing or names other domains) or DataError (the scaling law's file, the
    evaluation).
    """
    if config.rule not in ASCENDING:
        return {}
    if config.references == "list":
        return from_list(config.reference_losses, names)
    if config.references == "scaling_law":
        return from_scaling_law(config.scaling_law, names)
    assert config.references == "source", config.references
    if source_losses is None:
        raise ConfigError(
            "mixture.references is `source`, but there is no source model's evaluation; use list or scaling_law"
        )
    return checked(source_losses, names, "the source model's evaluation", DataError)


def checked(
    losses: Mapping[str, float], names: list[str], where: str, error: type[ConfigError] | type[DataError]
) -> dict[str, float]:
    """The losses in the order of `names`; raises `error` where one is missing, left over or not a positive number."""
    if set(losses) != set(names):
        missing, extra = sorted(set(names) - set(losses)), sorted(set(losses) - set(names))
        raise error(f"{where}: lacks the domains {missing} and has {extra} that the dataset does not; name each once")
    wrong = [
        name
        for name in names
        if isinstance(losses[name], bool)
        or not isinstance(losses[name], (int, float))
        or not math.isfinite(losses[name])
        or losses[name] <= 0
    ]
    if wrong:
        raise error(
            f"{where}: the loss of {wrong[0]!r} is {losses[wrong[0]]!r}; give a positive number of nats per token"
        )
    return {name: float(losses[name]) for name in names}


def from_list(losses: Mapping[str, float] | None, names: list[str]) -> dict[str, float]:
    """References typed into the run file."""
    if losses is None:
        raise ConfigError("mixture.references is `list`: give mixture.reference_losses, a loss per domain")
    return checked(losses, names, "mixture.reference_losses", ConfigError)


def from_scaling_law(file: str | None, names: list[str]) -> dict[str, float]:
    """References of a JSON file that tools/fit_reference_losses.py wrote."""
    if file is None:
        raise ConfigError(
            "mixture.references is `scaling_law`: give mixture.scaling_law, a file of fit_reference_losses.py"
        )
    path = Path(file)
    try:
        losses = json.loads(path.read_text(encoding="utf-8"))["references"]
        dict(losses)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a file of reference losses ({error}); make it with tools/fit_reference_losses.py"
        ) from error
    return checked(losses, names, str(path), DataError)
