"""Cost of a run: tokens, training FLOPs and wall time by phase, and FLOPs over steps.

FLOPs of matrix products, forward and backward (`ModelShape.flops_per_token`): 6 per weight and token, causal attention
counted half. Pruning counts the measured share of computed units, a teacher its forward pass for the steps that had
one. Calibration is a phase of its own. Evaluation is reported in seconds only.
"""

import math
from dataclasses import dataclass

import numpy as np

from megashear.config.model_shape import ModelShape
from megashear.config.resolve import in_principal_basis
from megashear.planning.calibration_cost import calibration_cost
from megashear.plots.metric_series import Phase
from megashear.report.run_record import RunRecord

CALIBRATION = "calibration"


@dataclass(frozen=True)
class PhaseCost:
    """One training phase, or calibration, which trains nothing: tokens; FLOPs of the model and of a teacher, and of the
    whole source on the same tokens (NaN where the shape is not known); live: mean share of the source's FLOPs in
    pruning (NaN: not measured, counted as 1); seconds, and how many of them were held-out evaluation (NaN where not
    recorded).
    """

    phase: str
    tokens: float
    flops: float
    teacher_flops: float
    source_flops: float
    live: float
    seconds: float
    evaluation_seconds: float


def costs(run: RunRecord) -> list[PhaseCost]:
    """The cost of calibration where there was one, and of every training phase that has begun."""
    found = []
    pruned = run.done.get("prune") or planned_calibration(run)
    if pruned.get("calibration_flops"):
        tokens, flops = float(pruned["calibration_tokens"]), float(pruned["calibration_flops"])
        one_shot = pruned.get("method") == "one_shot"  # its phase is calibration and one evaluation
        seconds = float(pruned.get("seconds" if one_shot else "calibration_seconds", math.nan))
        times = [seconds, float(pruned.get("evaluation_seconds", math.nan)) if one_shot else 0.0]
        found.append(PhaseCost(CALIBRATION, tokens, flops, 0.0, 0.0, math.nan, *times))
    for name in ("prune", "pretrain"):
        phase, tokens = run.phase(name), run.tokens(name)
        if not tokens:
            continue
        dense = flops_per_token(run, name)
        steps = np.array([phase.last_step()])
        live = float(live_steps(phase, steps)[0] / steps[0]) if name == "prune" else 1.0
        measured = name == "prune" and np.isfinite(phase.values("mask", "live_flops")).any()
        done = run.done.get(name, {})
        recorded = {key: phase.values("train", key) for key in ("seconds", "evaluation_seconds")}
        seconds, evaluating = (
            float(done.get(key, values[-1] if len(values) else math.nan)) for key, values in recorded.items()
        )
        found.append(
            PhaseCost(
                name,
                tokens,
                tokens * dense * live,
                tokens * dense * teacher_share(run, name) * float(distilled_steps(phase, steps)[0] / steps[0]),
                tokens * _per_token(run, run.source),
                live if measured else math.nan,
                seconds,
                evaluating,
            )
        )
    return found


def planned_calibration(run: RunRecord) -> dict[str, float]:
    """What pruning will record of the calibration before it, once it has begun; nothing where that is not known."""
    config, source, target = run.config, run.source, run.target
    if config is None or source is None or target is None or not run.tokens("prune"):
        return {}
    directions = in_principal_basis(config.prune, source, target)
    length = config.data.sequence_length
    planned = calibration_cost(config.prune, source, target, length, directions, config.precision)
    return {"calibration_tokens": planned.tokens, "calibration_flops": planned.flops}


def flops_per_token(run: RunRecord, phase: str) -> float:
    """Training FLOPs per token of the whole model of a phase; NaN where its shape or the run file is not known."""
    return _per_token(run, run.source if phase == "prune" else run.target)


def _per_token(run: RunRecord, shape: ModelShape | None) -> float:
    if shape is None or run.config is None:
        return math.nan
    return float(shape.flops_per_token(run.config.data.sequence_length))


def teacher_share(run: RunRecord, phase: str) -> float:
    """FLOPs of a teacher's forward pass as a share of those of training the whole model, while the teacher is there; 0
    without one.
    """
    recorded = run.phase(phase).values("train", "teacher_flops")
    known = recorded[np.isfinite(recorded)]
    return float(known[-1]) if len(known) else 0.0


def distilled_steps(phase: Phase, steps: np.ndarray) -> np.ndarray:
    """Steps so far that used a teacher, [n] -> [n]; all if the records do not contain them."""
    known = np.isfinite(phase.values("train", "distilled_steps"))
    at, distilled = phase.steps("train")[known], phase.values("train", "distilled_steps")[known]
    if not len(at):
        return np.asarray(steps, dtype=np.float64)
    found: np.ndarray = np.interp(steps, np.concatenate([[0.0], at]), np.concatenate([[0.0], distilled]))
    return found


def live_steps(phase: Phase, steps: np.ndarray) -> np.ndarray:
    """Steps so far, each counted as the share of the source's FLOPs that it needed: [n] -> [n].

    The recorded count where a record has one. It has none once live units were off: from there on a step counts as
    the mean share of the records around it, or whole. Beyond the last record a step counts as it did there.
    """
    at, share = phase.steps("mask"), phase.values("mask", "live_flops")
    counted = phase.values("mask", "live_steps")
    if not np.isfinite([share, counted]).any():
        return np.asarray(steps, dtype=np.float64)
    edges = np.concatenate([[0.0], at])
    share = np.concatenate([[1.0], np.where(np.isfinite(share), share, 1.0)])
    sums = [0.0]
    for recorded, evenly in zip(counted, np.diff(edges) * (share[1:] + share[:-1]) / 2, strict=True):
        sums.append(float(recorded if np.isfinite(recorded) else sums[-1] + evenly))
    beyond = np.maximum(np.asarray(steps) - edges[-1], 0.0) * share[-1]
    found: np.ndarray = np.interp(steps, edges, sums) + beyond
    return found


def trained_tokens(spent: list[PhaseCost]) -> float:
    """Tokens that a model was trained on."""
    return sum(cost.tokens for cost in spent if cost.phase != CALIBRATION)


@dataclass(frozen=True)
class Curve:
    """Mean held-out loss over domains at the evaluations of one phase, and what the run had cost by then, [n] each."""

    phase: str
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


def curves(run: RunRecord, domains: list[str]) -> list[Curve]:
    """The evaluations of every phase, over all that the run cost before; domains: whose mean is taken."""
    found, tokens, flops = [], 0.0, 0.0
    for cost in costs(run):
        if cost.phase == CALIBRATION:
            flops += cost.flops
            continue
        phase = run.phase(cost.phase)
        steps, last = phase.steps("eval"), phase.last_step()
        if len(steps):
            loss = np.mean([phase.values("eval", "loss", domain) for domain in domains], axis=0)
            share = (live_steps(phase, steps) if cost.phase == "prune" else steps) / last
            whole = live_steps(phase, np.array([last]))[0] / last if cost.phase == "prune" else 1.0
            distilled = distilled_steps(phase, steps) / max(1.0, distilled_steps(phase, np.array([last]))[0])
            spent = cost.flops * share / whole + cost.teacher_flops * distilled
            found.append(Curve(cost.phase, tokens + cost.tokens * steps / last, flops + spent, loss))
        tokens, flops = tokens + cost.tokens, flops + cost.flops + cost.teacher_flops
    return found
