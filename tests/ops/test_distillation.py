"""Distillation against float64, against torch's kl_div and cross_entropy, and against itself in parts of a vocabulary.

1e-6 of the loss in fp32: each probability is exact to a few roundings of 6e-8, and a sum over the vocabulary averages
them. At a temperature T the KL is the smaller, and T^2 multiplies it with its roundings.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megashear.config.resolve import DistillationPlan
from megashear.ops.distillation_loss import VocabularyPart, distillation_losses


def reference(logits: Tensor, labels: Tensor, teacher: Tensor, how: DistillationPlan, columns: int) -> list[Tensor]:
    """Loss, cross entropy, T^2 KL and the teacher's cross entropy per token in float64 by torch's own functions;
    autograd gives the gradient.
    """
    student, taught = logits.double()[:, :columns], teacher.double()[:, :columns]
    entropy, own = (F.cross_entropy(one, labels, reduction="none") for one in (student, taught))
    heat = how.temperature
    logs = [F.log_softmax(one / heat, -1) for one in (student, taught)]
    divergence = heat**2 * F.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1)
    return [(1 - how.weight) * entropy + how.weight * divergence, entropy, divergence, own]


def draw(tokens: int, width: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student's and teacher's logits [tokens, width], labels, and what each token counts."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(tokens, width, generator=generator) for _ in range(2))
    labels = torch.randint(0, columns, (tokens,), generator=generator)
    return [student.to(dtype), teacher.to(dtype), labels, torch.rand(tokens, generator=generator) / tokens]


def ours(
    student: Tensor, teacher: Tensor, labels: Tensor, counts: Tensor, how: DistillationPlan, columns: int
) -> tuple[Tensor, Tensor]:
    """The four numbers [4, tokens] and the gradient of the counted loss."""
    leaf = student.clone().requires_grad_()
    part = VocabularyPart(0, columns)
    losses = distillation_losses(leaf * 1, labels, lambda start, stop: teacher[start:stop], how, part)
    (losses[0] * counts).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(2, 300),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 50),
    temperature=st.sampled_from([0.5, 1.0, 1.7, 4.0]),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradient_against_float64(
    tokens: int, width: int, padding: int, chunk: int, temperature: float, share: float, seed: int
) -> None:
    columns = max(1, width - padding)
    student, teacher, labels, counts = draw(tokens, width, columns, seed)
    how = DistillationPlan(share, temperature, chunk)
    found, gradient = ours(student, teacher, labels, counts, how, columns)
    leaf = student.double().requires_grad_()
    expected = reference(leaf, labels, teacher, how, columns)
    (expected[0] * counts).sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=1e-6, atol=1e-6 * max(1.0, temperature**2))
    assert leaf.grad is not None
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-6, atol=1e-6 * float(counts.max()))
    assert not gradient[:, columns:].any(), "padding has no gradient"


def test_float64_stays_float64() -> None:
    student, teacher, labels, counts = draw(20, 50, 47, 9, torch.float64)
    how = DistillationPlan(0.6, 1.7, 6)
    found, gradient = ours(student, teacher, labels, counts, how, 47)
    leaf = student.clone().requires_grad_()
    expected = reference(leaf, labels, teacher, how, 47)
    (expected[0] * counts).sum().backward()
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_divergence_to_1e_6(temperature: float) -> None:
    student, teacher, labels, counts = draw(256, 5000, 5000, 1)
    how = DistillationPlan(0.5, temperature, 100)
    found, _ = ours(student, teacher, labels, counts, how, 5000)
    expected = reference(student, labels, teacher, how, 5000)
    for one, other in zip(found, expected, strict=True):
        assert float(one.double().mean()) == pytest.approx(float(other.mean()), rel=1e-6)


def test_a_small_divergence_keeps_its_digits() -> None:
    """Of nearly equal models; the plain difference of two sums would be rounding alone."""
    student, _, labels, counts = draw(64, 1000, 1000, 2)
    teacher = student + 1e-3 * draw(64, 1000, 1000, 3)[0]
    how = DistillationPlan(0.5, 1.0, 64)
    found, _ = ours(student, teacher, labels, counts, how, 1000)
    expected = reference(student, labels, teacher, how, 1000)[2]
    assert float(expected.mean()) < 1e-4
    assert float(found[2].double().mean()) == pytest.approx(float(expected.mean()), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_teacher_gives_zero_divergence(dtype: torch.dtype) -> None:
    student, _, labels, counts = draw(33, 500, 497, 4, dtype)
    found, gradient = ours(student, student, labels, counts, DistillationPlan(1.0, 2.0, 10), 497)
    assert not found[2].any() and not gradient.any()


def test_bf16_logits_are_exact_and_gradient_rounded() -> None:
    """Twice: over the logits, and times what a token counts; a bf16 rounding is up to 2^-8 of the number."""
    student, teacher, labels, counts = draw(50, 300, 290, 5, torch.bfloat16)
    how = DistillationPlan(0.3, 1.5, 16)
    found, gradient = ours(student, teacher, labels, counts, how, 290)
    wide, wide_gradient = ours(student.float(), teacher.float(), labels, counts, how, 290)
    assert found.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert torch.equal(found, wide)
    torch.testing.assert_close(gradient.float(), wide_gradient, rtol=2**-7 + 2**-14, atol=1e-30)


class Wide(TorchDispatchMode):
    """The largest number of elements of an fp32 tensor that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.dtype == torch.float32:
                self.largest = max(self.largest, one.numel())
        return out


def test_gradient_overwrites_logits_without_fp32_copy() -> None:
    student, teacher, labels, counts = draw(512, 400, 400, 6, torch.bfloat16)
    leaf = student.requires_grad_()
    logits = leaf * 1
    at = logits.data_ptr()
    with Wide() as seen:
        part = VocabularyPart(0, 400)
        losses = distillation_losses(logits, labels, lambda a, b: teacher[a:b], DistillationPlan(0.5, 2.0, 32), part)
        (gradient,) = torch.autograd.grad((losses[0] * counts).sum(), logits)
    assert seen.largest == 32 * 400
    assert gradient.data_ptr() == at


def test_logits_are_kept_without_gradients() -> None:
    student, teacher, labels, _ = draw(20, 50, 50, 7)
    before = student.clone()
    distillation_losses(
        student, labels, lambda a, b: teacher[a:b], DistillationPlan(0.5, 1.0, 8), VocabularyPart(0, 50)
    )
    assert torch.equal(student, before)


def test_backward_runs_only_once() -> None:
    student, teacher, labels, _ = draw(20, 50, 50, 8)
    logits = student.requires_grad_() * 1
    how, part = DistillationPlan(0.5, 1.0, 8), VocabularyPart(0, 50)
    loss = distillation_losses(logits, labels, lambda a, b: teacher[a:b], how, part)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        loss.backward()
