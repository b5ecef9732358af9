"""Which units stay in the products: live ones all, others only to fill up, and FLOPs counted as they are left."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from helpers.models import GROUPED, MULTI_HEAD
from megashear.config.presets import preset
from megashear.engine.layout import Layout
from megashear.masks.mask_values import Masks
from megashear.model.live_units import WHOLE, LivePattern, LivePlanner, flops_share, kept, kept_heads, live_patterns

bools = st.booleans()


@given(arrays.arrays(bool, st.integers(1, 200), elements=bools), st.sampled_from([1, 16, 64]))
def test_kept_units_hold_the_live_ones_and_fill_a_multiple(live, multiple):
    found = kept(live, multiple)
    if found is None:
        wanted = max(1, -(-int(live.sum()) // multiple)) * multiple
        assert len(live) - wanted <= len(live) / 32
        return
    assert (np.diff(found) > 0).all() and len(found) < len(live)
    assert set(np.flatnonzero(live)) <= set(found)
    assert len(found) % multiple == 0 and len(found) - live.sum() <= multiple


@given(arrays.arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 6)), elements=bools))
def test_kept_heads_are_equally_many_in_each_group_that_lives(live):
    found = kept_heads(live)
    if found is None:
        assert live.shape == (1, 1) or (live.any(1).all() and live.sum(1).max() == live.shape[1])
        return
    assert set(np.flatnonzero(live)) <= set(found.reshape(-1))
    groups = found // live.shape[1]
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == len(groups)
    if live.any():
        assert set(groups[:, 0]) == set(np.flatnonzero(live.any(1)))
        assert found.shape[1] == live.sum(1).max()


def test_patterns_of_several_micro_batches_come_in_their_order():
    masks = [
        Masks(hidden=torch.tensor([0.0, 0.5, 1.0]), layer=torch.tensor([1.0, 0.0])),
        Masks(torch.ones(3), layer=torch.zeros(2)),
    ]
    first, second = live_patterns(masks)
    assert first.hidden is not None and first.hidden.tolist() == [False, True, True]
    assert first.layer is not None and first.layer.tolist() == [True, False] and first.head is None
    assert second.layer is not None and not second.layer.any()
    assert live_patterns([Masks()]) == [WHOLE] and live_patterns([]) == []


def test_a_rank_plans_its_own_share(layout: Layout):
    shape = replace(GROUPED, num_query_groups=4)  # 12 heads, 3 in a group
    head = np.ones((3, 12), dtype=bool)
    head[0, :6] = False
    head[1] = False
    layouts = [replace(layout, tensor_size=2, tensor_rank=rank) for rank in range(2)]
    plans = [LivePlanner(shape, one, range(3))(LivePattern(None, head, None, None)) for one in layouts]
    # Rank 0 has no live head in layer 0: it keeps one, for the collectives; rank 1 keeps all of its own.
    assert (plans[0].layers[0].groups, plans[0].layers[0].queries) == (1, 1)
    assert plans[1].layers[0].heads is None and (plans[1].layers[0].groups, plans[1].layers[0].queries) == (2, 3)
    assert not any(plan.layers[1].attention for plan in plans) and all(plan.layers[1].mlp for plan in plans)
    rows = plans[0].layers[0].qkv_rows
    d = shape.head_dim
    assert rows is not None and rows.tolist() == [*range(d), *range(3 * d, 5 * d)]


def test_flops_of_the_published_targets():
    source = preset("llama2-7b")
    assert flops_share(WHOLE, source, 4096) == pytest.approx(1.0)
    for name in ("sheared-2.7b", "sheared-1.3b"):
        target = preset(name)

        def first(size: int, live: int) -> np.ndarray:
            return np.arange(size) < live

        pattern = LivePattern(
            first(source.hidden_size, target.hidden_size),
            np.tile(first(source.num_heads, target.num_heads), (32, 1)),
            np.tile(first(source.intermediate_size, target.intermediate_size), (32, 1)),
            first(source.num_layers, target.num_layers),
        )
        expected = target.flops_per_token(4096) / source.flops_per_token(4096)
        assert flops_share(pattern, source, 4096) == pytest.approx(expected, rel=1e-12), name


def test_without_a_mask_nothing_is_gathered(layout: Layout):
    plan = LivePlanner(MULTI_HEAD, layout, range(3))(WHOLE)
    assert plan.hidden is None
    for layer in plan.layers:
        assert layer.attention and layer.mlp and layer.heads is layer.qkv_rows is layer.intermediate is None
