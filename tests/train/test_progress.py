"""The progress line parses back to what was put in; rates are those of a clock that the test drives."""

import math
import re

import pytest

from megashear.planning.text_table import duration
from megashear.train.progress import Progress, peak_flops

LINE = re.compile(
    r"(?P<phase>\w+) +(?P<step>\d+)/(?P<steps>\d+)  loss (?P<loss>[\d.]+|nan)  grad (?P<grad>\S+)  lr (?P<lr>\S+)"
    r"  (?P<rate>[\d,]+) tok/s(?:  MFU (?P<mfu>[\d.]+)%)?(?:  sparsity (?P<sparsity>.+?))?  ETA (?P<eta>\d+:\d\d|-)$"
)


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def drive(progress: Progress, clock: Clock, steps: range, seconds: float, tokens: int) -> None:
    """Steps of `seconds` and `tokens` each, noted every steps.step."""
    for step in steps:
        clock.now += seconds * steps.step
        progress.advance(step, step * tokens)


def test_line_parses_back() -> None:
    clock = Clock()
    progress = Progress("prune", 3200, 6 * 7e9, "NVIDIA A100-SXM4-80GB", 16, clock=clock)
    drive(progress, clock, range(10, 1210, 10), seconds=4.0, tokens=131072)
    line = progress.line(2.43104, 0.8412, 7.31e-5, {"hidden": 0.3512, "head": 0.1}, {"hidden": 0.375, "head": 0.2})
    parsed = LINE.match(line)
    assert parsed, line
    assert (parsed["phase"], int(parsed["step"]), int(parsed["steps"])) == ("prune", 1200, 3200)
    assert float(parsed["loss"]) == 2.4310 and float(parsed["grad"]) == 0.841 and float(parsed["lr"]) == 7.31e-5
    assert int(parsed["rate"].replace(",", "")) == 32768
    assert float(parsed["mfu"]) == pytest.approx(100 * 32768 * 42e9 / (16 * 312e12), abs=0.05)
    assert parsed["sparsity"] == "hidden 35.1/37.5% head 10.0/20.0%"
    assert parsed["eta"] == duration(2000 * 4.0) == "2:13"


def test_unknown_device_has_no_mfu_and_no_masks_no_sparsity() -> None:
    clock = Clock()
    progress = Progress("pretrain", 100, 1e9, "cpu", 2, clock=clock)
    parsed = LINE.match(progress.line(math.nan, 0.5, 1e-4))
    assert parsed and parsed["mfu"] is None and parsed["sparsity"] is None
    assert parsed["loss"] == "nan" and parsed["eta"] == "-" and parsed["rate"] == "0"


def test_a_teacher_stands_beside_the_loss_with_its_cost() -> None:
    line = Progress("prune", 100, 1e9, "cpu", 2, clock=Clock()).line(
        2.5, 0.5, 1e-4, distillation=0.12344, teacher_flops=1 / 3
    )
    assert "  loss 2.5000  distillation 0.1234 (+33% FLOPs)  grad 0.5  " in line


def test_resumed_rate_counts_this_process_only() -> None:
    clock = Clock()
    progress = Progress("pretrain", 2000, 1e9, "cpu", 1, step=1000, tokens=1000 * 512, clock=clock)
    drive(progress, clock, range(1010, 1110, 10), seconds=0.5, tokens=512)
    assert progress.tokens_per_second == pytest.approx(1024)
    assert progress.seconds_left == pytest.approx(900 * 0.5)


def test_rate_follows_a_change_and_smooths_a_spike() -> None:
    clock = Clock()
    progress = Progress("prune", 10_000, 1e9, "cpu", 1, clock=clock)
    drive(progress, clock, range(10, 1010, 10), seconds=1.0, tokens=1000)
    clock.now += 10  # one slow evaluation
    drive(progress, clock, range(1010, 1020, 10), seconds=1.0, tokens=1000)
    assert 800 < progress.tokens_per_second < 1000
    drive(progress, clock, range(1020, 2020, 10), seconds=0.5, tokens=1000)
    assert progress.tokens_per_second == pytest.approx(2000, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (29, "0:00"), (3599, "1:00"), (11220, "3:07"), (360000, "100:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
