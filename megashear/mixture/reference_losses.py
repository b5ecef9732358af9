"""Reference losses of the domains: a list, a scaling law's prediction, or the source model's own losses.

Also holds published constants of Sheared LLaMA on RedPajama (section 3, appendix B), in the order of `DOMAINS`: weights
are shares of sequences, losses are nats per token on the authors' held-out split.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from megashear.config.schema import ASCENDING, MixtureConfig
from megashear.errors import ConfigError, DataError

DOMAINS = ("commoncrawl", "github", "book", "stackexchange", "wikipedia", "arxiv", "c4")


def table(*values: float) -> dict[str, float]:
    """Map one value per domain to the domain's name."""
    return dict(zip(DOMAINS, values, strict=True))


# Weights at the start of pruning (RedPajama's own mix) and of continued pre-training.
PRUNING_WEIGHTS = table(0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
CONTINUED_WEIGHTS = table(0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845)

# Reference losses that the authors used, read off the scaling law at the target's parameters.
REFERENCE_LOSSES = {
    "1.3b": table(1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251),
    "2.7b": table(1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328),
}
REFERENCE_PARAMETERS = {"1.3b": 1_345_423_360, "2.7b": 2_701_560_320}

# Losses of LLaMA2 by parameters, embeddings included: what the scaling law is fitted through.
LLAMA2_LOSSES = {
    6_738_415_616: table(1.7520, 0.6216, 1.9063, 1.4482, 1.4844, 1.2637, 1.9219),
    13_015_864_320: table(1.6680, 0.5791, 1.8242, 1.3936, 1.3945, 1.2109, 1.8486),
    68_976_648_192: table(1.4621, 0.4890, 1.6450, 1.2805, 1.2118, 1.1148, 1.6848),
}


def reference_losses(
    config: MixtureConfig, names: list[str], source_losses: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Reference loss of every domain in nats per token, in the order of `names`, from the configured provider.

    Args:
        mixture: Mixture section.
        names: Domains in order.
        source_losses: Held-out losses of the source, for `references: source`.

    Returns:
        Losses by domain; empty for rules without references (`static`, `schedule`, `ado`).

    Raises:
        ConfigError: A key is missing or names other domains.
        DataError: The scaling-law file or the evaluation is not usable.
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
    """Losses in the order of `names`. Raises `error` if one is missing, unknown or not a positive number."""
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
    """References listed in the run file."""
    if losses is None:
        raise ConfigError("mixture.references is `list`: give mixture.reference_losses, a loss per domain")
    return checked(losses, names, "mixture.reference_losses", ConfigError)


def from_scaling_law(file: str | None, names: list[str]) -> dict[str, float]:
    """References from a JSON file of tools/fit_reference_losses.py."""
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
