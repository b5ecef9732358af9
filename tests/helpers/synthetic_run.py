"""A generator of records such as a run of the published recipe leaves: losses, weights, masks, noise and all; whole run
folders of them, and what a report on one shows.
"""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megashear.config.load import load_config, save_config
from megashear.train.metrics import Metrics

DOMAINS = ("CommonCrawl", "GitHub", "Book", "StackExchange", "Wikipedia", "ArXiv", "C4")
REFERENCE = np.array([1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328])
PRUNE_WEIGHTS = np.array([0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15])
PRETRAIN_WEIGHTS = np.array([0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845])
TARGETS = {"hidden": 0.375, "head": 0.375, "intermediate": 0.372, "layer": 0.25}
KEYS = [
    "source.shape.preset=llama2-7b",
    "target.preset=sheared-1.3b",
    "data.folder=data",
    "data.sequence_length=4096",
    "run.phases=[prune,finalize,pretrain]",
]


class SyntheticRun:
    """Writes the records of one run, phase after phase."""

    def __init__(self, folder: Path, extra_domains: int = 0, seed: int = 0) -> None:
        self.noise = np.random.default_rng(seed)
        self.metrics = Metrics(folder, tensorboard=False, wandb_project=None, run_name="synthetic")
        self.domains = (*DOMAINS, *(f"extra-{i}" for i in range(extra_domains)))
        self.reference = np.concatenate([REFERENCE, self.noise.uniform(1.0, 2.2, extra_domains)])
        self.extra = np.full(extra_domains, 0.01)

    def named(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.domains, map(float, values), strict=True))

    def phase(self, phase: str, steps: int, batch: int, interval: int, log: int) -> None:
        """Losses that rise with the sparsity and fall again while pruning, fall alone while pre-training."""
        weights = np.concatenate([PRUNE_WEIGHTS if phase == "prune" else PRETRAIN_WEIGHTS, self.extra])
        weights /= weights.sum()
        tokens = np.zeros(len(self.domains))
        speed = 29_500 if phase == "prune" else 79_300
        for step in range(0, steps + 1, log):
            excess = self.excess(phase, step, steps)
            if step:
                tokens += np.floor(weights * batch * log) * 4096
                self.train(phase, step, steps, float(weights @ (self.reference + excess)), tokens, speed)
                if phase == "prune":
                    self.mask(step, steps)
            if step % interval == 0 and (step or phase == "pretrain"):
                error = self.noise.uniform(0.008, 0.02, len(self.domains))
                loss = self.reference + excess + error * self.noise.normal(size=len(error))
                weights = weights * np.exp(np.clip(loss - self.reference, 0, None) * 0.06)
                weights /= weights.sum()
                named = self.named
                record = {"loss": named(loss), "error": named(error), "reference": named(self.reference)}
                self.metrics.write({"phase": phase, "step": step, "kind": "eval", **record, "weights": named(weights)})

    def excess(self, phase: str, step: int, steps: int) -> np.ndarray:
        scale = np.linspace(0.7, 1.3, len(self.domains))
        done = step / steps
        if phase == "prune":
            rise = 2.2 * np.exp(-((done - 0.16) ** 2) / 0.012) + 0.55 * (1 - np.exp(-done / 0.05))
            return scale * (rise - 0.12 * done)
        return scale * (0.05 + 0.42 * np.exp(-done / 0.08)) - 0.04 * done

    def train(self, phase: str, step: int, steps: int, loss: float, tokens: np.ndarray, speed: float) -> None:
        record = {
            "loss": loss + 0.05 * self.noise.normal() if step % 4100 else None,
            "lr": 1e-4,
            "grad_norm": 0.9,
            "tokens": int(tokens.sum()),
            "tokens_per_second": speed * (1 - 0.02 * self.noise.exponential()) * (0.6 if step < steps / 60 else 1),
            "step_seconds": 8.0 - 4.5 * min(1.0, step / (0.2 * steps)) + 0.2 * self.noise.exponential(),
            "seconds": float(tokens.sum() / speed),
            "domain_tokens": {name: int(count) for name, count in zip(self.domains, tokens, strict=True)},
            "domain_epochs": {
                name: count / 2e8 / (i + 1) for i, (name, count) in enumerate(zip(self.domains, tokens, strict=True))
            },
            "skipped": step // 4100,
        }
        self.metrics.write({"phase": phase, "step": step, "kind": "train", **record})

    def mask(self, step: int, steps: int) -> None:
        grown = min(1.0, step / (0.2 * steps))
        live = 1.0 - 0.59 * np.minimum(1.0, np.arange(1, step + 1) / (0.2 * steps))
        lag = 0.05 * np.exp(-(((step / steps) - 0.2) ** 2) / 0.004)
        target = {name: value * grown for name, value in TARGETS.items()}
        expected = {name: max(0.0, t - lag * (1 + i / 3)) for i, (name, t) in enumerate(target.items())}
        rise = {name: 8 * (1 - np.exp(-step / steps * (4 + i))) * (1 + i / 4) for i, name in enumerate(TARGETS)}
        multipliers = {"lambda1": rise, "lambda2": {name: 2.5 * value + step / 300 for name, value in rise.items()}}
        record = {"expected": expected, "target": target, **multipliers, "lagrangian": 0.01}
        record |= {"live_flops": live[-1], "live_steps": live.sum()}
        self.metrics.write({"phase": "prune", "step": step, "kind": "mask", **record})

    def masks(self, layers: int = 32, heads: int = 32, intermediate: int = 1376, hidden: int = 512) -> None:
        """Deterministic masks: soft values above 0.9, and exactly the target's share of zeros in each row."""

        def row(units: int, kept: int) -> np.ndarray:
            values = 1 / (1 + np.exp(-1.2 * self.noise.uniform(1.9, 4.6, units)))
            values[self.noise.permutation(units)[kept:]] = 0.0
            return values

        self.metrics.write_masks(
            {
                "hidden": row(hidden, hidden * 5 // 8),
                "head": np.stack([row(heads, heads * 5 // 8) for _ in range(layers)]),
                "intermediate": np.stack([row(intermediate, int(intermediate * 0.628)) for _ in range(layers)]),
                "layer": row(layers, layers * 3 // 4),
            }
        )

    def whole(self) -> None:
        """Both phases and the masks, at the published lengths."""
        self.phase("prune", steps=3200, batch=32, interval=50, log=10)
        self.masks()
        self.phase("pretrain", steps=48_000, batch=256, interval=400, log=100)
        self.metrics.close()


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def phase_done(folder: Path, phase: str, names: tuple[str, ...], loss: float, **more: object) -> None:
    """The record of a finished phase; losses rise by 0.1 from domain to domain."""
    losses = {name: loss + 0.1 * number for number, name in enumerate(names)}
    (folder / phase).mkdir(parents=True, exist_ok=True)
    record = {"name": phase, "losses": losses, "errors": dict.fromkeys(names, 0.01), **more}
    (folder / phase / "done.json").write_text(json.dumps(record))


def make_run(folder: Path, keys=(), names=DOMAINS, finished: bool = True, final: float = 1.8) -> Path:
    """A run of both phases, as `megashear run` leaves it; unfinished: while it prunes."""
    folder.mkdir()
    save_config(load_config(None, [*KEYS, f"run.folder={folder}", *keys]), folder / "config.yaml")
    (folder / "identity.json").write_text("{}")
    (folder / "source_losses.json").write_text(json.dumps({name: [1.5, 0.01] for name in names}))
    run = SyntheticRun(folder)
    run.domains = names
    run.phase("prune", steps=40, batch=8, interval=20, log=10)
    run.masks(layers=4, heads=8, intermediate=64, hidden=32)
    if finished:
        run.phase("pretrain", steps=40, batch=8, interval=20, log=10)
        near = [{"granularity": "head", "kept": 20, "below_half": 3, "worst": 0.125}]
        times = {"seconds": 7200.0, "evaluation_seconds": 1800.0}
        phase_done(folder, "prune", names, 2.5, tokens=1_000_000, **times)
        kept = {"hidden": 20, "layer": 3, "group": 15, "head": 15, "intermediate": 120}
        phase_done(folder, "finalize", names, 2.4, kept=kept, borderline=near)
        phase_done(folder, "pretrain", names, final, tokens=3_000_000, **times)
    run.metrics.close()
    return folder


@pytest.fixture
def small_pictures(monkeypatch):
    """Pictures of few pixels: what is in them is tested by test_run.py and test_pictures.py."""
    monkeypatch.setattr("megashear.report.html_page.DPI", 30)


@pytest.fixture(scope="session")
def published_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records of a whole run on seven domains."""
    folder = tmp_path_factory.mktemp("run")
    SyntheticRun(folder).whole()
    return folder
