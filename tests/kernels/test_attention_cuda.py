"""The CUDA kernels of attention, thread by thread on the CPU and on a GPU where there is one, against float64."""

import pytest
import torch

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels import attention as kernel
from megashear.ops.kernels import attention_backend as attention_choice
from megashear.ops.kernels.library import _LIBRARIES, launching

from .agreement import DTYPES, assert_filled, assert_within, leaf, poisoned, wide
from .attention_bounds import Case, bounds
from .conftest import CUDA
from .test_attention import _case, _gradients

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
PARTS = ("out", "dq", "dk", "dv", "dmask")


def _attention(*inputs) -> torch.Tensor:
    return kernel.masked_attention(*inputs)[0]


def _ours(case: Case, device: torch.device) -> list[torch.Tensor | None]:
    inputs = [None if x is None else leaf(x.to(device)) for x in (case.q, case.k, case.v, case.mask)]
    first = None if case.first is None else case.first.to(device)
    found = _gradients(_attention, *inputs, first, case.dout.to(device))
    return [None if x is None else x.cpu() for x in found]


def _check(case: Case, pair: bool, device: torch.device) -> None:
    exact_inputs = [wide(x) for x in (case.q, case.k, case.v, case.mask)]
    exact = _gradients(reference.attention, *exact_inputs, case.first, case.dout.double())
    for name, ours_part, exact_part, bound in zip(
        PARTS, _ours(case, device), exact, bounds(case, exact[0], pair), strict=True
    ):
        if ours_part is not None:
            print(name)  # the part that failed
            assert_within(ours_part, exact_part, bound + 1e-30)


@pytest.fixture
def way(request, cuda_device, monkeypatch) -> str:
    """The kernels that a test asks for; skipped on a GPU that lacks them."""
    library = _LIBRARIES[cuda_device.type]
    if request.param not in library.masked_attention_tiles(library.BFLOAT16).split():
        pytest.skip(f"this GPU has no {request.param}")
    monkeypatch.setattr(kernel, "TILES", request.param)
    return request.param


TENSOR_CORES = pytest.mark.parametrize("way", ["wgmma", "tensor_cores"], indirect=True)
EVERY_WAY = pytest.mark.parametrize("way", ["wgmma", "tensor_cores", "plain"], indirect=True)


@TENSOR_CORES
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
        (2, 6, 3, 60, 112, {"masked": True, "documents": True}),
        (1, 2, 1, 300, 33, {"masked": True, "documents": True}),
    ],
)
def test_tensor_cores_agree_with_float64(batch, heads, groups, tokens, head_dim, parts, dtype, cuda_device, way):
    _check(_case(batch, heads, groups, tokens, head_dim, dtype, **parts), True, cuda_device)


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
def test_plain_kernels_agree_with_float64(heads, groups, tokens, head_dim, parts, dtype, cuda_device, monkeypatch):
    monkeypatch.setattr(kernel, "TILES", "plain")
    _check(_case(1, heads, groups, tokens, head_dim, dtype, **parts), False, cuda_device)


@pytest.mark.parametrize("tiles", ["wgmma", "tensor_cores", "plain"])
def test_the_order_of_threads_changes_no_bit(tiles, emulated, monkeypatch):
    """Nor does running twice; and no row of a tile lies in the banks of another one that is read with it."""
    monkeypatch.setattr(kernel, "TILES", tiles)
    case = _case(2, 4, 2, 40 if tiles == "plain" else 150, 72, torch.bfloat16, masked=True, documents=True)
    conflicts, results = emulated.bank_conflicts(), []
    for descending in (False, True, False):
        emulated.descend(descending)
        results.append(_ours(case, CPU))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    assert emulated.bank_conflicts() == conflicts


@EVERY_WAY
def test_a_dead_head_is_never_read(cuda_device, way):
    case = _case(1, 4, 4, 70, 48, torch.bfloat16)
    mask = torch.tensor([1.0, 0.0, 0.5, -0.0])
    dead = mask == 0
    clean = _ours(Case(case.q, case.k, case.v, mask, None, case.dout), cuda_device)
    q, k, v, dout = (torch.where(dead[:, None, None], float("nan"), x) for x in (case.q, case.k, case.v, case.dout))
    ours = _ours(Case(q, k, v, mask, None, dout), cuda_device)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    assert all((x[:, dead] == 0).all() for x in ours[:4]) and (ours[4][dead] == 0).all()


@TENSOR_CORES
def test_any_strides_give_the_bits_of_contiguous_inputs(cuda_device, way):
    """Rows that are no multiple of 16 bytes apart, or do not begin at one, go element by element."""
    case = _case(1, 2, 1, 70, 64, torch.bfloat16, masked=True)
    tensors = [x.to(cuda_device).contiguous() for x in (case.q, case.k, case.v)]
    mask, dout = case.mask.to(cuda_device), case.dout.to(cuda_device)
    whole = _gradients(_attention, *map(leaf, (*tensors, mask)), None, dout)
    for before, after in ((1, 0), (0, 3), (8, 8)):
        padded = [torch.nn.functional.pad(x, (before, after), value=float("nan")) for x in tensors]
        q, k, v = (x[..., before : before + 64].detach().requires_grad_() for x in padded)
        parts = _gradients(_attention, q, k, v, leaf(mask), None, dout)
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


@TENSOR_CORES
def test_large_scores_are_finite_and_nan_propagates(cuda_device, way):
    case = _case(1, 1, 1, 130, 48, torch.bfloat16)
    q, k, v = (x.to(cuda_device) for x in (case.q, case.k, case.v))
    out = _attention(100 * q, 100 * k, v, None, None).cpu()
    exact = reference.attention((100 * case.q).double(), (100 * case.k).double(), case.v.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.1)
    k = k.clone()
    k[:, :, 100] = float("nan")
    out = _attention(q, k, v, None, None)
    assert out[:, :, :100].isfinite().all() and out[:, :, 100:].isnan().all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_2_to_the_31_elements(dtype):
    """Heads so far apart that 32 bits cannot count the elements between them; memory that nobody touches costs none."""
    tokens, head_dim, apart = 3, 16, 2**31 + 8
    room = torch.empty(apart + tokens * head_dim, dtype=dtype)
    far = room.as_strided((1, 2, tokens, head_dim), (0, apart, head_dim, 1))
    case = _case(1, 2, 2, tokens, head_dim, dtype)
    far.copy_(case.q)
    assert torch.equal(_attention(far, case.k, case.v, None, None), _attention(case.q, case.k, case.v, None, None))


def test_each_kernel_is_deterministic(emulated, monkeypatch):
    """So the name reaches the kernels; small heads have no warpgroups."""
    for head_dim, count in ((64, 3), (32, 2)):
        case = _case(1, 2, 1, 200, head_dim, torch.bfloat16)
        found = [_ours(case, CPU)[0]]
        for name in ("wgmma", "tensor_cores", "plain"):
            monkeypatch.setattr(kernel, "TILES", name)
            found.append(_ours(case, CPU)[0])
        assert torch.equal(found[0], found[1])
        assert len({tuple(x.flatten().tolist()) for x in found}) == count
        monkeypatch.setattr(kernel, "TILES", "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(3, 5), (64, 32), (81, 128)])
def test_writes_every_element_and_no_other(tokens, head_dim, dtype, cuda_device):
    case = _case(2, 4, 2, tokens, head_dim, dtype, masked=True, documents=True)
    inputs = (case.q, case.k, case.v, case.dout, case.mask, case.first)
    q, k, v, dout, mask, first = (x.to(cuda_device) for x in inputs)
    sizes = (2, 4, 2, tokens, head_dim)

    def empty(heads: int) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        buffer = poisoned(tokens * 2 * heads * head_dim, dtype, cuda_device)
        return buffer, (buffer.data_ptr(), heads * head_dim, head_dim, 2 * heads * head_dim)

    (out, to_out), (dq, to_dq), (dk, to_dk), (dv, to_dv) = map(empty, (4, 4, 2, 2))
    lse, dmask = poisoned(2 * 4 * tokens, torch.float32, cuda_device), poisoned(4, torch.float32, cuda_device)
    bound = [kernel._bound(x) for x in (q, k, v)]
    vectors = (mask.data_ptr(), first.data_ptr(), to_out, lse.data_ptr())
    with launching(q) as (library, executor):
        scratch = poisoned(library.masked_attention_scratch(sizes), torch.float32, cuda_device)
        rest = (sizes, kernel.dtype_code(q), "", executor)
        library.masked_attention_forward(*bound, *vectors, *rest)
        to = (to_dq, to_dk, to_dv, dmask.data_ptr(), scratch.data_ptr())
        library.masked_attention_backward(kernel._bound(dout), *bound, *vectors, *to, *rest)
    assert_filled(out, lse, dq, dk, dv, dmask, scratch)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 8), (2, 2, 1, 0, 8), (2, 0, 0, 5, 8), (1, 2, 2, 3, 0)])
def test_empty_inputs(sizes, cuda_device):
    case = _case(*sizes, torch.bfloat16, masked=True)
    out, *gradients = _ours(case, cuda_device)
    assert out.shape == case.q.shape and gradients[1].shape == case.k.shape and (gradients[3] == 0).all()


@pytest.mark.gpu
@CUDA
def test_gpu_measures_attention_backend(monkeypatch):
    monkeypatch.setattr(attention_choice, "_CHOICES", {})
    device = torch.device("cuda", 0)
    case = _case(2, 8, 2, 300, 64, torch.bfloat16, masked=True)
    inputs = [x.to(device) for x in (case.q, case.k, case.v, case.mask)]
    out = ops.attention(*inputs)
    exact = reference.attention(*(wide(x) for x in (case.q, case.k, case.v, case.mask)))
    assert_within(out.cpu(), exact.detach(), 2 * bounds(case, exact.detach(), True)[0])  # torch's rounds once more
    (choice,) = attention_choice._CHOICES.values()
    assert max(choice.distances.values()) <= attention_choice.LIMITS[torch.bfloat16]
    assert set(choice.milliseconds) == {*kernel.kernel_names(device, torch.bfloat16), "reference"}
