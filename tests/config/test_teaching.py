"""Whether the source teaches where the run file leaves it open."""

from pathlib import Path

import pytest

from config.test_check import config
from megashear.config.presets import PRESETS
from megashear.config.teaching import WEIGHT, teaching

SOURCE, SMALL = PRESETS["llama2-7b"], PRESETS["sheared-1.3b"]
PAPER = "prune.preset=paper"


@pytest.mark.parametrize(
    ("target", "overrides", "prune", "pretrain"),
    [
        ("sheared-2.7b", [], WEIGHT, WEIGHT),
        ("sheared-1.3b", [], 0, 0),  # the source's forward pass takes 1.7 times what training the target does
        ("sheared-1.3b", ["prune.distillation.weight=0.25"], 0.25, 0.25),
        ("sheared-2.7b", ["prune.distillation.weight=0"], 0, 0),
        ("sheared-2.7b", ["pretrain.distillation.weight=0"], WEIGHT, 0),
        ("sheared-2.7b", [PAPER], 0, 0),
        ("sheared-2.7b", [PAPER, "pretrain.distillation.weight=1"], 0, 1),
        ("sheared-2.7b", ["prune.method=one_shot"], WEIGHT, WEIGHT),
        ("sheared-2.7b", ["prune.method=one_shot", "prune.distillation.weight=0"], 0, 0),
        ("sheared-2.7b", ["source.folder=null"], 0, 0),  # weights out of the seed
        ("sheared-2.7b", ["source.folder=null", "pretrain.distillation.weight=0.5"], 0, 0.5),  # refused by `check`
    ],
)
def test_an_open_weight(tmp_path: Path, target: str, overrides: list[str], prune: float, pretrain: float) -> None:
    found = teaching(config(tmp_path, *overrides), SOURCE, PRESETS[target])
    assert (found["prune"].weight, found["pretrain"].weight) == (prune, pretrain)


def test_without_source_or_target_nobody_teaches(tmp_path: Path) -> None:
    for source, target in ((None, SMALL), (SOURCE, None), (None, None)):
        assert [how.weight for how in teaching(config(tmp_path), source, target).values()] == [0, 0]


def test_the_other_keys_are_the_sections(tmp_path: Path) -> None:
    keys = ["prune.distillation.temperature=2", "pretrain.distillation.chunk=7", "pretrain.distillation.until=end"]
    found = teaching(config(tmp_path, *keys), SOURCE, SMALL)
    assert (found["prune"].temperature, found["prune"].until) == (2, "outgrown")
    assert (found["pretrain"].chunk, found["pretrain"].until) == (7, "end")
