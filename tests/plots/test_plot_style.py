"""Labels are kept apart, colours are told apart and belong to a name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from megashear.plots.plot_style import PALETTE, line_styles, new_figure, panel, spread, step_axis


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=18))
def test_labels_stand_apart_in_order_and_within(places: list[float]) -> None:
    gap = 0.055
    spaced = spread(np.array(places), gap, 0.0, 1.0)
    order = np.argsort(places, kind="stable")
    assert (np.diff(spaced[order]) >= gap - 1e-9).all()
    assert spaced.min() >= -1e-9 and spaced.max() <= 1 + 1e-9


def test_labels_with_room_stay_where_they_are() -> None:
    np.testing.assert_allclose(spread(np.array([0.9, 0.1, 0.5]), 0.05, 0.0, 1.0), [0.9, 0.1, 0.5])
    np.testing.assert_allclose(spread(np.array([0.5, 0.5]), 0.1, 0.0, 1.0), [0.45, 0.55])


def test_no_two_of_twenty_names_look_alike() -> None:
    styles = line_styles([f"domain-{i}" for i in range(20)])
    assert len({(style["color"], str(style["linestyle"])) for style in styles.values()}) == 20


def test_palette_is_told_apart_without_red_green() -> None:
    """Seen by a deuteranope (Vienot, Brettel and Mollon 1999, linear RGB) every pair still differs clearly."""
    linear = np.array(
        [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(p)] for p in PALETTE]
    )
    seen = linear @ np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]).T
    encoded = np.clip(seen, 0, 1) ** (1 / 2.2)
    distance = np.linalg.norm(encoded[:, None] - encoded[None], axis=-1) + 9 * np.eye(len(PALETTE))
    assert distance.min() > 0.1


@pytest.mark.parametrize(("last", "label"), [(80, "80"), (3200, "3,000"), (48_000, "40k")])
def test_step_axis_labels(last: int, label: str) -> None:
    axes = panel(new_figure(6, 4, "", ""), 1, 1, 3, 2)
    step_axis(axes, last, 3.0)
    axes.figure.draw_without_rendering()
    texts = [text.get_text() for text in axes.get_xticklabels()]
    assert texts[0] == "0" and texts[-1] == label
