"""Cross entropy kernels against the float64 reference: parts of a vocabulary, padding, gradients over the logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.cross_entropy import cross_entropy_terms
from megashear.ops.kernels.library import dtype_code, launching

from .agreement import UNIT, assert_within, leaf, wide

DTYPES = [torch.float32, torch.bfloat16]
SINGLE = UNIT[torch.float32]


def _case(tokens: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(tokens, width, generator=generator)).to(dtype)
    labels = torch.randint(-width // 4, width + width // 4 + 1, (tokens,), generator=generator)
    dterms = torch.randn(2, tokens, generator=generator)
    return logits.to(device), labels.to(device), dterms.to(device)


def _check(logits, labels, dterms, first: int, columns: int, overwrite: bool) -> None:
    exact, ours = wide(logits), leaf(logits)
    exact_sum, exact_label = reference.cross_entropy_terms(exact, labels + first, first, columns)
    kept = ours.view_as(ours)  # not a leaf, as in a model
    log_sum, label_logit = ops.cross_entropy_terms(kept, labels + first, first, columns, overwrite)
    assert log_sum.dtype == torch.float32 and torch.equal(label_logit.double(), exact_label)
    # Exponentials within 3 units; additions within a strip of 1024 and over strips; the logarithm; the addition.
    additions = math.sqrt(columns) + columns / 1024 + 8
    if columns:
        assert_within(log_sum, exact_sum, SINGLE * (additions + 4 * exact_sum.abs() + 4))
    else:
        assert (log_sum == -torch.inf).all()
    torch.autograd.backward((log_sum, label_logit), tuple(dterms))
    torch.autograd.backward((exact_sum, exact_label), tuple(dterms.double()))
    probability = dterms[0].double().abs()[:, None] * F.softmax(exact.detach()[:, :columns], -1)
    bound = UNIT[logits.dtype] * exact.grad.abs() + 1e-30
    # The exponent is off by the roundings of the logit less the sum, and of the sum itself.
    bound[:, :columns] += probability * SINGLE * (additions + 8 * exact_sum.abs()[:, None] + 100)
    assert_within(ours.grad, exact.grad, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("tokens", "width", "columns"), [(5, 4099, 4000), (300, 2048, 1500)])
def test_agrees_with_float64(tokens, width, columns, overwrite, dtype, device):
    _check(*_case(tokens, width, dtype, device), 1000, columns, overwrite)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.integers(1, 3000), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_agrees_at_any_size(device, tokens, width, share, dtype, seed):
    columns = max(1, round(share * width))
    _check(*_case(tokens, width, dtype, device, seed), 7 * seed, columns, overwrite=bool(seed % 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_vocabulary_equals_torch_cross_entropy(dtype, device):
    logits, labels, _ = _case(50, 321, dtype, device)
    labels = labels.clamp(0, 320)
    ours, exact = leaf(logits), wide(logits)
    log_sum, label_logit = ops.cross_entropy_terms(ours, labels)
    (log_sum - label_logit).mean().backward()
    loss = F.cross_entropy(exact, labels)
    loss.backward()
    torch.testing.assert_close((log_sum - label_logit).mean().double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1.1 * UNIT[dtype] + 3e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_part_of_padding_contributes_nothing(dtype, device):
    logits, labels, dterms = _case(4, 8, dtype, device)
    x = leaf(logits)
    log_sum, label_logit = ops.cross_entropy_terms(x, labels, 0, 0)
    assert (log_sum == -torch.inf).all() and (label_logit == 0).all()
    torch.autograd.backward((log_sum, label_logit), (torch.zeros_like(dterms[0]), dterms[1]))
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_non_finite_logits(dtype, device):
    rows = torch.full((5, 2000), -3e4)
    rows[0, 1500] = 3e4
    rows[1:3, 3], rows[3, 1999], rows[4, 0] = torch.nan, torch.inf, -torch.inf
    logits = rows.to(device, dtype)
    log_sum, _ = ops.cross_entropy_terms(logits, torch.full((5,), 9, device=device))
    exact = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(log_sum[[0, 4]].double(), exact[[0, 4]], rtol=2 * SINGLE, atol=0)
    assert not log_sum[1:4].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "columns"), [(3, 5, 4), (40, 16, 16), (13, 2056, 2000)])
def test_writes_every_element_and_no_other(tokens, width, columns, dtype, device):
    logits, labels, dterms = _case(tokens, width, dtype, device)
    guard = 64

    def poisoned(elements: int) -> torch.Tensor:
        return torch.full((elements + guard,), float("nan"), device=device)

    log_sum, label_logit = poisoned(tokens), poisoned(tokens)
    buffer = torch.cat((logits.flatten(), torch.full((guard,), float("nan"), dtype=dtype, device=device)))
    with launching(logits) as (library, executor):
        sizes = (tokens, width, columns, 0, dtype_code(logits), executor)
        library.cross_entropy_forward(
            buffer.data_ptr(), labels.data_ptr(), log_sum.data_ptr(), label_logit.data_ptr(), *sizes
        )
        gradients = (dterms[0].data_ptr(), dterms[1].data_ptr())
        library.cross_entropy_backward(buffer.data_ptr(), labels.data_ptr(), log_sum.data_ptr(), *gradients, *sizes)
    for written in (log_sum, label_logit, buffer):
        assert written[:-guard].isfinite().all() and written[-guard:].isnan().all()
    assert (buffer[:-guard].view(tokens, width)[:, columns:] == 0).all()


def test_gradient_overwrites_logits_only_if_allowed(device):
    logits, labels, _ = _case(6, 40, torch.bfloat16, device)
    for overwrite in (True, False):
        x = leaf(logits)
        product = x * 1
        log_sum, _ = ops.cross_entropy_terms(product, labels, overwrite=overwrite)
        log_sum.sum().backward(retain_graph=True)
        assert torch.equal(product.detach(), logits) != overwrite
        if overwrite:  # what is gone cannot be taken for logits a second time
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                log_sum.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    logits, labels, dterms = _case(70, 3001, dtype, device)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = leaf(logits)
            terms = ops.cross_entropy_terms(x, labels, 0, 2900)
            torch.autograd.backward(terms, tuple(dterms))
            results.append((*terms, x.grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_takes_strided_logits(device):
    logits, labels, _ = _case(24, 30, torch.float32, device)
    strided, labels = logits.view(4, 6, 30).transpose(0, 1), labels.view(4, 6).t()
    ours, exact = leaf(logits), leaf(logits)
    total = ops.cross_entropy_terms(ours.view(4, 6, 30).transpose(0, 1), labels, overwrite=True)
    expected = reference.cross_entropy_terms(exact.view(4, 6, 30).transpose(0, 1), labels)
    torch.testing.assert_close(total, expected)
    sum(total).sum().backward()
    sum(expected).sum().backward()
    torch.testing.assert_close(ours.grad, exact.grad)
    assert torch.equal(strided, logits.view(4, 6, 30).transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_proper_torch_op(dtype, device):
    logits, labels, _ = _case(6, 9, dtype, device)
    opcheck(cross_entropy_terms, (leaf(logits.view(2, 3, 9)), labels.view(2, 3), 0, 8, False))


@pytest.mark.parametrize("overwrite", [True, False])
def test_compiles_into_one_graph(overwrite, device):
    logits, labels, _ = _case(6, 40, torch.float32, device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        log_sum, label_logit = ops.cross_entropy_terms(x * 2, labels, 0, 38, overwrite)
        return (log_sum - label_logit).sum()

    x, y = leaf(logits), leaf(logits)
    torch.compile(loss, backend="aot_eager", fullgraph=True)(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("shape", "labels", "columns"),
    [((3, 7), torch.zeros(4).long(), 7), ((3, 7), torch.zeros(3), 7), ((3, 7), torch.zeros(3).long(), 8)],
)
def test_refuses_what_does_not_fit(shape, labels, columns, device):
    with pytest.raises(ValueError, match="must be"):
        ops.cross_entropy_terms(torch.zeros(shape, device=device), labels.to(device), 0, columns)
