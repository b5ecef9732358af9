"""The CUDA kernels of attention at sizes drawn by chance, emulated: some minutes of processor time.

python -m pytest tests/kernels/test_attention_any_size.py -m slow
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megashear.ops.kernels import attention as kernel

from .agreement import DTYPES
from .test_attention import _case
from .test_attention_cuda import CPU, _check

few = st.integers(1, 3)
ways = st.sampled_from(["wgmma", "tensor_cores", "plain"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(few, few, few, st.integers(1, 200), st.integers(1, 140), st.sampled_from(DTYPES), ways, st.data())
def test_any_size_agrees_with_float64(emulated, batch, groups, queries, tokens, head_dim, dtype, way, data):
    masked, documents = data.draw(st.booleans()), data.draw(st.booleans())
    case = _case(batch, groups * queries, groups, tokens, head_dim, dtype, tokens, masked=masked, documents=documents)
    pair = way != "plain" and dtype != torch.float32 and head_dim <= 128
    kernel.TILES = way
    try:
        _check(case, pair, CPU)
    finally:
        kernel.TILES = ""
