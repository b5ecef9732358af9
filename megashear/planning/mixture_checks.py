"""Check the mixture section: weights can be normalised, references exist, limits are consistent."""

from megashear.config.resolve import training_phases
from megashear.config.schema import ADAPTIVE, ASCENDING, Config, MixtureConfig


def mixture_problems(config: Config) -> list[str]:
    """Problems of the mixture section, independent of the dataset; empty if no phase trains."""
    if not training_phases(config):
        return []
    mixture = config.mixture
    problems = []
    for key in ("initial_weights", "pretrain_weights"):
        problems += _weight_problems(key, getattr(mixture, key), adaptive=mixture.rule in ADAPTIVE)
    if mixture.rule in ASCENDING:
        problems += _reference_problems(config)
    if mixture.rule in ADAPTIVE:
        problems += _guard_problems(mixture)
    return problems + _schedule_problems(mixture)


def _schedule_problems(mixture: MixtureConfig) -> list[str]:
    schedule = mixture.schedule
    if mixture.rule != "schedule":
        used = "used by `rule: schedule` alone; set the rule, or leave it null"
        return [] if schedule is None else [f"mixture.schedule: {used}"]
    if not schedule:
        return ["mixture.schedule: missing; give every domain its weights, as {web: [0.7, 0.5], code: [0.3, 0.5]}"]
    lengths = {name: len(points) for name, points in schedule.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        return [f"mixture.schedule: every domain needs the same number of weights, one or more; there are {counts}"]
    low = [name for name, points in schedule.items() if min(points) < 0]
    if low:
        return [f"mixture.schedule: {', '.join(low)}: weights are not negative"]
    empty = [number for number, row in enumerate(zip(*schedule.values(), strict=True)) if sum(row) <= 0]
    return [f"mixture.schedule: the weights at point {empty[0] + 1} sum to 0; raise one"] if empty else []


def _weight_problems(key: str, weights: dict[str, float] | None, adaptive: bool) -> list[str]:
    if weights is None:
        return []
    if not weights:
        return [f"mixture.{key}: no domain is named; name all, or leave it null"]
    low = [name for name, weight in weights.items() if weight < 0 or (weight == 0 and adaptive)]
    if low:
        reason = "a weight that follows the losses has to start above 0" if adaptive else "weights are not negative"
        return [f"mixture.{key}: {', '.join(low)}: {reason}; raise it, or leave the domain out"]
    if sum(weights.values()) <= 0:
        return [f"mixture.{key}: they sum to 0; raise one"]
    return []


def _reference_problems(config: Config) -> list[str]:
    mixture = config.mixture
    if mixture.references == "source" and config.source.folder is None:
        return [
            "mixture.references: `source` evaluates the source model, and source.folder is null; use `list` or "
            "`scaling_law`, or rule: static"
        ]
    if mixture.references == "scaling_law" and mixture.scaling_law is None:
        return ["mixture.scaling_law: missing; give the JSON file of tools/fit_reference_losses.py"]
    if mixture.references != "list":
        return []
    losses = mixture.reference_losses
    if not losses:
        return ["mixture.reference_losses: missing; give a loss in nats per token for every domain"]
    problems = []
    negative = [name for name, loss in losses.items() if loss < 0]
    if negative:
        problems.append(f"mixture.reference_losses: {', '.join(negative)}: a cross entropy is not negative")
    weights = mixture.initial_weights
    if weights is not None and weights.keys() != losses.keys():
        odd = ", ".join(sorted(weights.keys() ^ losses.keys()))
        problems.append(f"mixture.reference_losses: {odd}: not in both this and initial_weights; name the same domains")
    return problems


def _guard_problems(mixture: MixtureConfig) -> list[str]:
    problems = []
    if mixture.floor > mixture.cap:
        problems.append(f"mixture.floor: {mixture.floor} is above mixture.cap {mixture.cap}; lower it")
    count = len(mixture.initial_weights or mixture.reference_losses or ())
    if count and mixture.floor * count > 1:
        problems.append(f"mixture.floor: {mixture.floor} x {count} domains is above 1; use at most {1 / count:.4f}")
    if count and mixture.cap * count < 1:
        problems.append(f"mixture.cap: {mixture.cap} x {count} domains is below 1; use at least {1 / count:.4f}")
    return problems
