"""Apply another mixture rule to the recorded losses of a run (`megashear mixture simulate RUN KEY=VALUE`).

Updates happen at the recorded steps. With the run's own rule the recorded weights are reproduced. Losses stay as
recorded: the effect of other weights on them is not known.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from megashear.config.load import load_config
from megashear.config.resolve import IDENTITY
from megashear.config.schema import ASCENDING, MixtureConfig
from megashear.errors import ConfigError, DataError
from megashear.files.atomic import write_json
from megashear.mixture.domain_weights import Mixture
from megashear.phases.run_folder import read_record
from megashear.planning.text_table import table
from megashear.plots.metric_series import Phase, phases_of
from megashear.plots.mixture_plots import draw_weights
from megashear.plots.plot_style import STYLE, save
from megashear.train.metrics import FILE_NAME, read_metrics

NAME = "simulated_weights"


def simulate(run: Path, overrides: list[str], output: Path | None) -> None:
    """Print start, recorded and simulated weights, and write `simulated_weights.json` and `.png`.

    Args:
        run: Run folder, whose mixture section the overrides change; or a `metrics.jsonl`, for which they name all
            values that are not defaults.
        overrides: `mixture.KEY=VALUE` texts.
        output: Output folder; None: `plots` next to the records.

    Raises:
        ConfigError, DataError, StorageError: The overrides or records are not usable, or writing fails.
    """
    path = run / FILE_NAME if run.is_dir() else run
    phases = [phase for phase in phases_of(read_metrics(path)) if phase.records.get("eval")]
    if not phases:
        raise DataError(f"{path}: no held-out losses in it; give a run that has trained")
    config = _mixture(path.parent / IDENTITY, overrides)
    played, weights = [], None
    for phase in phases:
        mixture = _start(config, phase, weights)
        played.append(_play(mixture, phase))
        weights = mixture.weights
    print(_told(phases, played))
    folder = path.parent / "plots" if output is None else output
    write_json(folder / f"{NAME}.json", {s.name: _weights(s) for s in played})
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = draw_weights(played, "Simulated domain weights", f"rule: {config.rule}, on recorded losses")
        assert figure is not None
        print(save(figure, folder / f"{NAME}.png"))


def _mixture(identity: Path, overrides: list[str]) -> MixtureConfig:
    """Mixture section: the run's own if its config is next to the records, with the overrides."""
    foreign = [text for text in overrides if not text.startswith("mixture.")]
    if foreign:
        raise ConfigError([f"override {text!r}: not a key of mixture, such as mixture.rule=ado" for text in foreign])
    own = (read_record(identity) or {}).get("mixture", {})
    known = MixtureConfig.__dataclass_fields__.keys()
    given = [f"mixture.{name}={json.dumps(value)}" for name, value in own.items() if name in known]
    return load_config(None, [*given, *overrides]).mixture


def _start(config: MixtureConfig, phase: Phase, weights: dict[str, float] | None) -> Mixture:
    """Mixture at the start of a phase: configured, else from the previous phase's end, else as first recorded."""
    records = phase.records["eval"]
    domains = dict.fromkeys(records[0]["weights"], 1)
    references = config.reference_losses or records[0].get("reference") or {}
    if config.rule in ASCENDING and not references:
        raise ConfigError("mixture.reference_losses: the run recorded none; give them for this rule")
    mixture = Mixture(config, domains, references, phase.last_step())
    if phase.name == "pretrain" and config.pretrain_weights is not None:
        mixture.set_weights(config.pretrain_weights)
    elif weights is not None:
        mixture.set_weights(weights)
    elif config.initial_weights is None:
        mixture.set_weights(records[0]["weights"])
    return mixture


def _play(mixture: Mixture, phase: Phase) -> Phase:
    """Apply the rule at each evaluation of a phase; weights do not change at its end, nor at the start of pruning."""
    records = []
    for record in phase.records["eval"]:
        step = record["step"]
        if step < phase.last_step() and (step > 0 or phase.name == "pretrain"):
            mixture.update(record["loss"], step)
        records.append(record | {"weights": mixture.weights})
    return replace(phase, records={"eval": records})


def _weights(phase: Phase) -> list[dict[str, Any]]:
    return [{"step": record["step"], "weights": record["weights"]} for record in phase.records["eval"]]


def _told(recorded: list[Phase], played: list[Phase]) -> str:
    """Table per phase: weight of each domain as recorded and as simulated, at the end and in the mean."""
    texts = []
    for one, other in zip(recorded, played, strict=True):
        pairs = [[record["weights"] for record in phase.records["eval"]] for phase in (one, other)]
        rows = [
            [
                name,
                *(f"{rows[-1][name]:.4f}" for rows in pairs),
                *(f"{sum(row[name] for row in rows) / len(rows):.4f}" for rows in pairs),
            ]
            for name in pairs[0][0]
        ]
        header = ["domain", "end, recorded", "end, simulated", "mean, recorded", "mean, simulated"]
        texts.append(table(f"Weights of {one.name}", header, rows))
    return "\n\n".join(texts)
