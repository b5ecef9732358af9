"""The CUDA kernels of attention, run thread by thread on the CPU, against float64: values, gradients, bits, banks."""

import pytest
import torch

from megashear.ops import reference
from megashear.ops.kernels import attention as kernel
from megashear.ops.kernels.library import launching

from .agreement import DTYPES, assert_filled, assert_within, leaf, poisoned, wide
from .attention_bounds import Case, bounds
from .test_attention import _case, _gradients

pytestmark = pytest.mark.usefixtures("emulated")

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
PARTS = ("out", "dq", "dk", "dv", "dmask")


def _attention(*inputs) -> torch.Tensor:
    return kernel.masked_attention(*inputs)[0]


def _ours(case: Case) -> list[torch.Tensor | None]:
    inputs = [None if x is None else leaf(x) for x in (case.q, case.k, case.v, case.mask)]
    return _gradients(_attention, *inputs, case.first, case.dout)


def _check(case: Case, pair: bool) -> None:
    exact_inputs = [wide(x) for x in (case.q, case.k, case.v, case.mask)]
    exact = _gradients(reference.attention, *exact_inputs, case.first, case.dout.double())
    for name, ours_part, exact_part, bound in zip(PARTS, _ours(case), exact, bounds(case, exact[0], pair), strict=True):
        if ours_part is not None:
            print(name)  # the part that failed
            assert_within(ours_part, exact_part, bound + 1e-30)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "head_dim", "parts"),
    [
        (1, 1, 1, 1, 64, {}),
        (2, 2, 1, 33, 48, {"masked": True}),
        (1, 4, 2, 130, 64, {"masked": True, "documents": True}),
        (1, 2, 2, 64, 80, {"documents": True}),
        (1, 1, 1, 101, 96, {"masked": True}),
        (1, 3, 1, 193, 128, {"masked": True, "documents": True}),
        (1, 1, 1, 37, 7, {"masked": True}),
        (1, 1, 1, 20, 100, {}),
    ],
)
def test_tensor_cores_agree_with_float64(batch, heads, groups, tokens, head_dim, parts, dtype):
    _check(_case(batch, heads, groups, tokens, head_dim, dtype, **parts), pair=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "head_dim", "parts"),
    [
        (1, 1, 1, 1, {}),
        (4, 2, 50, 33, {"masked": True, "documents": True}),
        (2, 1, 17, 160, {"masked": True}),
        (1, 1, 40, 256, {"documents": True}),
    ],
)
def test_plain_kernels_agree_with_float64(heads, groups, tokens, head_dim, parts, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "TILES", "plain")
    _check(_case(1, heads, groups, tokens, head_dim, dtype, **parts), pair=False)


@pytest.mark.parametrize("tiles", ["", "plain"])
def test_the_order_of_threads_changes_no_bit(tiles, emulated, monkeypatch):
    """Nor does running twice; and no row of a tile lies in the banks of another one that is read with it."""
    monkeypatch.setattr(kernel, "TILES", tiles)
    case = _case(2, 4, 2, 150 if tiles == "" else 40, 72, torch.bfloat16, masked=True, documents=True)
    conflicts, results = emulated.bank_conflicts(), []
    for descending in (False, True, False):
        emulated.descend(descending)
        results.append(_ours(case))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    assert emulated.bank_conflicts() == conflicts


@pytest.mark.parametrize("tiles", ["", "plain"])
def test_a_dead_head_is_never_read(tiles, monkeypatch):
    monkeypatch.setattr(kernel, "TILES", tiles)
    case = _case(1, 4, 4, 70, 32, torch.bfloat16)
    mask = torch.tensor([1.0, 0.0, 0.5, -0.0])
    dead = mask == 0
    clean = _ours(Case(case.q, case.k, case.v, mask, None, case.dout))
    q, k, v, dout = (torch.where(dead[:, None, None], float("nan"), x) for x in (case.q, case.k, case.v, case.dout))
    ours = _ours(Case(q, k, v, mask, None, dout))
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    assert all((x[:, dead] == 0).all() for x in ours[:4]) and (ours[4][dead] == 0).all()


def test_any_strides_give_the_bits_of_contiguous_inputs():
    """Rows that are no multiple of 16 bytes apart, or do not begin at one, go element by element."""
    case = _case(1, 2, 1, 70, 64, torch.bfloat16, masked=True)
    whole = _ours(Case(*(x.contiguous() for x in (case.q, case.k, case.v)), case.mask, None, case.dout))
    for before, after in ((1, 0), (0, 3), (8, 8)):
        padded = [torch.nn.functional.pad(x, (before, after), value=float("nan")) for x in (case.q, case.k, case.v)]
        q, k, v = (x[..., before : before + 64].detach().requires_grad_() for x in padded)
        parts = _gradients(_attention, q, k, v, leaf(case.mask), None, case.dout)
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_large_scores_stay_finite_and_nan_reaches_those_that_see_it():
    case = _case(1, 1, 1, 130, 16, torch.bfloat16)
    out = _attention(100 * case.q, 100 * case.k, case.v, None, None)
    exact = reference.attention((100 * case.q).double(), (100 * case.k).double(), case.v.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.1)
    k = case.k.clone()
    k[:, :, 100] = float("nan")
    out = _attention(case.q, k, case.v, None, None)
    assert out[:, :, :100].isfinite().all() and out[:, :, 100:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_2_to_the_31_elements(dtype):
    """Heads so far apart that 32 bits cannot count the elements between them; memory that nobody touches costs none."""
    tokens, head_dim, apart = 3, 16, 2**31 + 8
    room = torch.empty(apart + tokens * head_dim, dtype=dtype)
    far = room.as_strided((1, 2, tokens, head_dim), (0, apart, head_dim, 1))
    case = _case(1, 2, 2, tokens, head_dim, dtype)
    far.copy_(case.q)
    assert torch.equal(_attention(far, case.k, case.v, None, None), _attention(case.q, case.k, case.v, None, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(3, 5), (64, 32), (81, 128)])
def test_writes_every_element_and_no_other(tokens, head_dim, dtype):
    case = _case(2, 4, 2, tokens, head_dim, dtype, masked=True, documents=True)
    sizes = (2, 4, 2, tokens, head_dim)

    def empty(heads: int) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        buffer = poisoned(tokens * 2 * heads * head_dim, dtype, CPU)
        return buffer, (buffer.data_ptr(), heads * head_dim, head_dim, 2 * heads * head_dim)

    (out, to_out), (dq, to_dq), (dk, to_dk), (dv, to_dv) = map(empty, (4, 4, 2, 2))
    lse, dmask = poisoned(2 * 4 * tokens, torch.float32, CPU), poisoned(4, torch.float32, CPU)
    q, k, v, dout = (kernel._bound(x) for x in (case.q, case.k, case.v, case.dout))
    vectors = (case.mask.data_ptr(), case.first.data_ptr(), to_out, lse.data_ptr())
    with launching(case.q) as (library, executor):
        scratch = poisoned(library.masked_attention_scratch(sizes), torch.float32, CPU)
        rest = (sizes, kernel.dtype_code(case.q), "", executor)
        library.masked_attention_forward(q, k, v, *vectors, *rest)
        to = (to_dq, to_dk, to_dv, dmask.data_ptr(), scratch.data_ptr())
        library.masked_attention_backward(dout, q, k, v, *vectors, *to, *rest)
    assert_filled(out, lse, dq, dk, dv, dmask, scratch)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 8), (2, 2, 1, 0, 8), (2, 0, 0, 5, 8), (1, 2, 2, 3, 0)])
def test_empty_inputs(sizes):
    case = _case(*sizes, torch.bfloat16, masked=True)
    out, *gradients = _ours(case)
    assert out.shape == case.q.shape and gradients[1].shape == case.k.shape and (gradients[3] == 0).all()
