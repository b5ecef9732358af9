"""Masked attention kernels against float64: values, gradients, any size, groups, documents, dead heads, any strides."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels import attention as kernel
from megashear.ops.kernels.library import launching

from .agreement import assert_filled, assert_repeats, assert_within, leaf, poisoned, wide
from .attention_bounds import Case, bounds

DTYPES = [torch.float32, torch.bfloat16]
ALL_TILES = ["avx512_bf16", "avx512", "avx2", "portable"]
CPU = torch.device("cpu")


# The op has no CUDA source: a GPU is served by torch's attention.
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.parametrize("device", ["cpu"], indirect=True)]


def _usable(dtype: torch.dtype) -> list[str]:
    with launching(torch.empty(0)) as (library, _):
        code = {torch.float32: library.FLOAT32, torch.bfloat16: library.BFLOAT16}[dtype]
        return library.masked_attention_tiles(code).split()


def _documents(batch: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Where the document of each position starts: int32 [batch, tokens]."""
    starts = torch.where(torch.rand(batch, tokens, generator=generator) < 0.1, torch.arange(tokens), 0)
    return starts.cummax(1).values.int()


def _case(
    batch: int, heads: int, groups: int, tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0, **parts: bool
) -> Case:
    """Random inputs as views of one fused product [S, B, R]; `masked` and `documents` are the parts to add."""
    generator = torch.Generator().manual_seed(seed)

    def rows(heads: int) -> torch.Tensor:
        return 1.5 * torch.randn(tokens, batch, heads, head_dim, generator=generator)

    fused = torch.cat([rows(heads), rows(groups), rows(groups)], dim=2).to(dtype).permute(1, 2, 0, 3)
    q, k, v = fused.split([heads, groups, groups], dim=1)
    mask = torch.rand(heads, generator=generator) * (torch.rand(heads, generator=generator) < 0.7)
    first = _documents(batch, tokens, generator) if parts.get("documents") else None
    dout = rows(heads).to(dtype).permute(1, 2, 0, 3)
    return Case(q, k, v, mask if parts.get("masked") else None, first, dout)


def _gradients(function, q, k, v, mask, first, dout) -> list[torch.Tensor | None]:
    out = function(q, k, v, mask, first)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad, None if mask is None else mask.grad]


def _check(case: Case, pair: bool) -> None:
    inputs = [None if x is None else leaf(x) for x in (case.q, case.k, case.v, case.mask)]
    ours = _gradients(ops.attention, *inputs, case.first, case.dout)
    exact_inputs = [wide(x) for x in (case.q, case.k, case.v, case.mask)]
    exact = _gradients(reference.attention, *exact_inputs, case.first, case.dout.double())
    for name, ours_part, exact_part, bound in zip(
        ("out", "dq", "dk", "dv", "dmask"), ours, exact, bounds(case, exact[0], pair), strict=True
    ):
        if ours_part is not None:
            print(name)  # the part that failed
            assert_within(ours_part, exact_part, bound + 1e-30)


@pytest.mark.parametrize("tiles", ALL_TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "head_dim"),
    [
        (2, 3, 3, 130, 32),
        (1, 4, 2, 65, 48),
        (2, 2, 2, 64, 64),
        (1, 6, 2, 77, 80),
        (1, 2, 2, 100, 96),
        (1, 2, 1, 200, 128),
        (1, 2, 2, 33, 7),
        (2, 2, 1, 1, 20),
    ],
)
def test_agrees_with_float64(batch, heads, groups, tokens, head_dim, dtype, tiles, monkeypatch):
    if tiles not in _usable(dtype):
        pytest.skip(f"this processor has no {tiles}, or it does not compute {dtype}")
    monkeypatch.setattr(kernel, "TILES", tiles)
    for parts in ({}, {"masked": True}, {"documents": True}, {"masked": True, "documents": True}):
        _check(_case(batch, heads, groups, tokens, head_dim, dtype, **parts), tiles == "avx512_bf16")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@example(1, 1, 1, 24, 58, torch.float32, False, True, 0)  # queries that see no key of the first step
def test_agrees_at_any_size(batch, groups, queries, tokens, head_dim, dtype, masked, documents, seed):
    heads = groups * queries
    case = _case(batch, heads, groups, tokens, head_dim, dtype, seed, masked=masked, documents=documents)
    _check(case, "avx512_bf16" in _usable(dtype) and dtype == torch.bfloat16)


@given(st.permutations(range(4)), st.permutations(range(4)), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_takes_any_strides(order, dout_order, step, expanded):
    """The same bits as contiguous inputs, whatever the order of dimensions in memory; leaves' gradients likewise."""
    case = _case(2, 4, 2, 40, 24, torch.bfloat16, masked=True)

    def laid_out(x: torch.Tensor, order: list[int]) -> torch.Tensor:
        back = [order.index(i) for i in range(4)]
        spaced = torch.empty(*(x.shape[i] for i in order[:3]), step * x.shape[order[3]], dtype=x.dtype)[..., ::step]
        return spaced.copy_(x.permute(order)).permute(back)

    dout = case.dout[:1, :1, :1].expand_as(case.dout) if expanded else case.dout
    results = []
    for q, k, v, upstream in (
        [x.contiguous() for x in (case.q, case.k, case.v, dout)],
        [laid_out(x, order) for x in (case.q, case.k, case.v)] + [dout if expanded else laid_out(dout, dout_order)],
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, case.mask)]
        results.append(_gradients(ops.attention, *leaves, None, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_results_are_laid_out_tokens_first():
    case = _case(2, 4, 2, 9, 16, torch.float32)
    out, lse = kernel.masked_attention(case.q, case.k, case.v, None, None)
    gradients = kernel.masked_attention_backward(case.dout, case.q, case.k, case.v, None, None, out, lse)
    assert all(x.permute(2, 0, 1, 3).is_contiguous() for x in (out, *gradients[:3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_do_not_attend_to_each_other(dtype):
    """One packed sequence against its documents alone."""
    case = _case(1, 2, 2, 150, 32, dtype)
    ends = [0, 1, 50, 64, 129, 150]
    first = torch.cat([torch.full((1, e - b), b, dtype=torch.int32) for b, e in pairwise(ends)], 1)
    packed = _gradients(ops.attention, leaf(case.q), leaf(case.k), leaf(case.v), None, first, case.dout)
    for begin, end in pairwise(ends):
        part = [x[:, :, begin:end] for x in (case.q, case.k, case.v, case.dout)]
        alone = Case(*part[:3], None, None, part[3])
        exact = _gradients(reference.attention, *map(wide, part[:3]), None, None, part[3].double())
        limits = bounds(alone, exact[0], dtype == torch.bfloat16)
        for ours, right, bound in zip(packed[:4], exact[:4], limits[:4], strict=True):
            assert_within(ours[:, :, begin:end], right, bound + 1e-30)


def test_a_dead_head_is_never_read():
    case = _case(2, 4, 4, 70, 32, torch.bfloat16)
    mask = torch.tensor([1.0, 0.0, 0.5, -0.0])
    dead = mask == 0
    clean = _gradients(ops.attention, leaf(case.q), leaf(case.k), leaf(case.v), leaf(mask), None, case.dout)
    q, k, v = (leaf(torch.where(dead[:, None, None], float("nan"), x)) for x in (case.q, case.k, case.v))
    ours = _gradients(ops.attention, q, k, v, leaf(mask), None, case.dout)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    assert all((x[:, dead] == 0).all() for x in ours[:4]) and (ours[4][dead] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(3, 5), (64, 32), (81, 48)])
def test_writes_every_element_and_no_other(tokens, head_dim, dtype):
    case = _case(2, 4, 2, tokens, head_dim, dtype, masked=True, documents=True)

    def empty(heads: int) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        buffer = poisoned(tokens * 2 * heads * head_dim, dtype, CPU)
        return buffer, (buffer.data_ptr(), heads * head_dim, head_dim, 2 * heads * head_dim)

    (out, to_out), (dq, to_dq), (dk, to_dk), (dv, to_dv) = map(empty, (4, 4, 2, 2))
    lse, dmask, partial = (poisoned(n, torch.float32, CPU) for n in (2 * 4 * tokens, 4, 2 * 4))
    q, k, v, dout = (kernel._bound(x) for x in (case.q, case.k, case.v, case.dout))
    vectors = (case.mask.data_ptr(), case.first.data_ptr(), to_out, lse.data_ptr())
    with launching(case.q) as (library, executor):
        rest = ((2, 4, 2, tokens, head_dim), kernel.dtype_code(case.q), "", executor)
        library.masked_attention_forward(q, k, v, *vectors, *rest)
        to = (to_dq, to_dk, to_dv, dmask.data_ptr(), partial.data_ptr())
        library.masked_attention_backward(dout, q, k, v, *vectors, *to, *rest)
    assert_filled(out, lse, dq, dk, dv, dmask, partial)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype):
    case = _case(2, 4, 2, 100, 32, dtype, masked=True, documents=True)

    def run():
        leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
        return _gradients(ops.attention, *leaves, case.first, case.dout)

    assert_repeats(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_non_finite_inputs(dtype):
    """Scores beyond what exp can take are shifted first; NaN reaches the queries that see it and no earlier block."""
    case = _case(1, 1, 1, 130, 16, dtype)
    out = ops.attention(100 * case.q, 100 * case.k, case.v)
    exact = reference.attention((100 * case.q).double(), (100 * case.k).double(), case.v.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.1)
    k = case.k.clone()
    k[:, :, 128] = float("nan")
    out = ops.attention(case.q, k, case.v)
    assert out[:, :, :128].isfinite().all() and out[:, :, 128:].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 8), (2, 2, 1, 0, 8), (2, 0, 0, 5, 8), (1, 2, 2, 3, 0)])
def test_empty_inputs(sizes):
    case = _case(*sizes, torch.float32, masked=True)
    leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
    out, *gradients = _gradients(ops.attention, *leaves, None, case.dout)
    assert out.shape == case.q.shape and [x.shape for x in gradients] == [x.shape for x in leaves]
    assert (gradients[3] == 0).all()


def test_fp16_is_computed_in_fp32():
    case = _case(1, 4, 2, 50, 16, torch.float32, masked=True)
    q, k, v = (x.half() for x in (case.q, case.k, case.v))
    out = ops.attention(q, k, v, case.mask)
    assert out.dtype == torch.float16
    assert torch.equal(out, ops.attention(q.float(), k.float(), v.float(), case.mask).half())


def test_float64_and_forced_backends_use_reference(monkeypatch):
    case = _case(1, 2, 2, 20, 16, torch.float64, masked=True)
    exact = reference.attention(case.q, case.k, case.v, case.mask)
    assert torch.equal(ops.attention(case.q, case.k, case.v, case.mask), exact)
    calls = []
    monkeypatch.setattr(reference, "attention", lambda *inputs: calls.append(inputs))
    ops.attention(case.q.float(), case.k.float(), case.v.float())
    assert not calls and ops.backend("cpu")["attention"] == "compiled-cpu"
    monkeypatch.setenv("MEGASHEAR_KERNELS", "reference")
    ops.attention(case.q.float(), case.k.float(), case.v.float())
    assert len(calls) == 1 and ops.backend("cpu")["attention"] == "reference"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [{}, {"masked": True, "documents": True}])
def test_is_a_proper_torch_op(dtype, parts):
    case = _case(2, 4, 2, 6, 8, dtype, **parts)
    leaves = [None if x is None else leaf(x) for x in (case.q, case.k, case.v, case.mask)]
    opcheck(kernel.masked_attention, (*leaves, case.first))


def test_compiles_into_one_graph():
    case = _case(2, 4, 2, 20, 16, torch.bfloat16, masked=True, documents=True)
    compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, ops.attention):
        leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
        results.append(_gradients(function, *leaves, case.first, case.dout))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("q", "k", "mask", "first"),
    [
        ((1, 4, 5, 8), (1, 3, 5, 8), None, None),
        ((1, 4, 5, 8), (1, 2, 6, 8), None, None),
        ((1, 4, 5), (1, 4, 5), None, None),
        ((1, 4, 5, 8), (1, 4, 5, 8), (3,), None),
        ((1, 4, 5, 8), (1, 4, 5, 8), None, (1, 4)),
    ],
)
def test_refuses_shapes_that_do_not_fit(q, k, mask, first):
    mask = None if mask is None else torch.ones(mask)
    first = None if first is None else torch.zeros(first, dtype=torch.int32)
    with pytest.raises(ValueError, match="must be"):
        ops.attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), mask, first)
