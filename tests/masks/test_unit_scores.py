"""Scores: masks of 0 and 1 that open what is kept, units near the cut, and the file."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megashear.config.model_shape import ModelShape
from megashear.errors import CheckpointError
from megashear.masks.kept_units import kept_units_of
from megashear.masks.mask_specs import MaskSpec, mask_specs
from megashear.masks.unit_scores import Scores, load_scores, near_cut, not_finite, open_units, save_scores

SOURCE = ModelShape(16, 3, 8, 4, 4, 12, 50)
TARGET = ModelShape(10, 2, 2, 2, 4, 7, 50)
SPECS = mask_specs(SOURCE, TARGET)


def draw(seed: int, levels: int = 1000) -> dict[str, torch.Tensor]:
    """Random scores; few levels make many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randint(0, levels, spec.shape, generator=generator).float() for spec in SPECS}


@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 5, 1000]))
def test_masks_are_one_exactly_where_units_are_kept(seed: int, levels: int) -> None:
    scores = draw(seed, levels)
    keep, masks = kept_units_of(scores, SPECS, SOURCE), open_units(scores, SPECS, SOURCE)
    for kept, mask in ((keep.hidden, masks.hidden), (keep.layer, masks.layer)):
        assert mask is not None
        assert mask.nonzero()[:, 0].tolist() == kept.tolist()
        assert set(mask.tolist()) == {0.0, 1.0}
    for kept, mask in ((keep.head, masks.head), (keep.intermediate, masks.intermediate)):
        assert mask is not None
        assert mask.nonzero()[:, 1].view(kept.shape).tolist() == kept.tolist()
        assert set(mask.flatten().tolist()) == {0.0, 1.0}


def test_units_near_the_cut_are_those_within_their_error() -> None:
    spec = MaskSpec("hidden", (5,), 3)
    scores = {"hidden": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])}  # cut at 2.5
    for error, count in ((0.1, 0), (0.6, 2), (1.6, 4), (9.0, 5)):
        assert near_cut(Scores(scores, {"hidden": torch.full((5,), error)}, {}), spec) == count
    assert near_cut(Scores(scores, scores, {}), MaskSpec("hidden", (5,), 5)) == 0


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    units, errors = draw(1), draw(2)
    domains = {"a/b ü": draw(3), "web": draw(4)}
    scores = Scores(units, errors, dict.fromkeys(units, "fisher"), domains, {"a/b ü": 3, "web": 4, "none": 0})
    save_scores(tmp_path / "x.safetensors", scores, {"seed": 1})
    found, made_by = load_scores(tmp_path / "x.safetensors")
    assert made_by == {"seed": 1}
    assert (found.criteria, found.samples) == (scores.criteria, scores.samples)
    for one, other in (
        (found.units, units),
        (found.errors, errors),
        *((found.domains[d], domains[d]) for d in domains),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert found.domains.keys() == domains.keys()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "other file"])
def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    save_scores(path, Scores(draw(1), draw(2), {}), {})
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut short": content[:-8], "other file": b"\x02\0\0\0\0\0\0\0{}"}[damage])
    with pytest.raises(CheckpointError, match=str(path)):
        load_scores(path)


def test_numbers_that_are_not_finite_are_seen() -> None:
    units = draw(1)
    assert not_finite(Scores(units, {}, {})) == []
    units["group"][1, 2] = torch.nan
    assert not_finite(Scores(units, {}, {})) == ["group"]
