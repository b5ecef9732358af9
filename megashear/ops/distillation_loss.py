"""Distillation loss per token: KL of logits plus cross entropy, over parts of a vocabulary.

    loss = (1 - w) * cross entropy(student) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))

(Hinton et al. 2015, section 2). fp32 copies exist for `chunk` tokens at a time. The student's logits are overwritten by
their gradient while the teacher's are available, so the teacher's logits are computed once. Ranks that share a
vocabulary exchange eight numbers per token and chunk, and one more per token.
Shape suffixes: N tokens of a chunk, V this rank's columns of the vocabulary without padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megashear.config.resolve import DistillationPlan

TeacherLogits = Callable[[int, int], Tensor]
"""Computes the teacher's logits [stop - start, columns] of tokens start .. stop for the same vocabulary part."""


@dataclass(frozen=True)
class VocabularyPart:
    """This rank's part of a vocabulary sharded over `group`: entries from `first`, `columns` of them not padding."""

    first: int
    columns: int
    group: dist.ProcessGroup | None = None


def distillation_losses(
    logits: Tensor, labels: Tensor, teacher: TeacherLogits, how: DistillationPlan, part: VocabularyPart
) -> Tensor:
    """Compute the distillation loss and its parts. Collective over the group of `part`.

    Only the loss has a gradient. The forward pass already overwrites the logits with it (if they are contiguous), with
    weight 1 for each token. The backward pass scales it by the upstream gradient and can run once.

    Args:
        logits: The student's logits [.., columns] of any floating dtype, this rank's part.
        labels: int64 [..].
        teacher: Computes the teacher's logits of a range of tokens, in the order of `logits.flatten(0, -2)`.
        how: Weight, temperature and chunk size.
        part: This rank's part of the vocabulary.

    Returns:
        [4, ..] in nats, at least fp32: loss, cross entropy, T^2 KL, and the teacher's cross entropy. Every rank of the
        group gets the same bits.
    """
    return _Distillation.apply(logits, labels, teacher, how, part)


class _Distillation(torch.autograd.Function):
    apply: ClassVar[Callable[..., Tensor]]  # untyped in torch

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: TeacherLogits, how: DistillationPlan, part: VocabularyPart
    ) -> Tensor:
        rows, targets = logits.detach().reshape(-1, logits.shape[-1]), labels.reshape(-1)
        entropy = rows.new_empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
        divergence, own = torch.empty_like(entropy), torch.empty_like(entropy)
        for start in range(0, len(rows), how.chunk):
            stop = min(start + how.chunk, len(rows))
            here = rows[start:stop]
            entropy[start:stop], divergence[start:stop], own[start:stop], gradient_NV = _chunk(
                here, targets[start:stop], teacher(start, stop), how, part, ctx.needs_input_grad[0]
            )
            if gradient_NV is not None:
                here[:, : part.columns] = gradient_NV
                here[:, part.columns :] = 0
        if part.group is not None and part.group.size() > 1:
            dist.all_reduce(divergence, group=part.group)
        ctx.rows, ctx.shape, ctx.chunk = rows, logits.shape, how.chunk
        mixed = (1 - how.weight) * entropy + how.weight * divergence
        return torch.stack((mixed, entropy, divergence, own)).view(4, *labels.shape)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, ctx.rows = ctx.rows, None
        assert rows is not None, (
            "the backward pass of a distillation loss can run only once, because its gradient overwrites the logits"
        )
        for part, counts in zip(rows.split(ctx.chunk), dlosses[0].reshape(-1, 1).split(ctx.chunk), strict=True):
            part.copy_(part.to(counts.dtype) * counts)
        return rows.view(ctx.shape), None, None, None, None


def _chunk(
    logits: Tensor, labels_N: Tensor, teacher: Tensor, how: DistillationPlan, part: VocabularyPart, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return cross entropy [N], this rank's terms of T^2 KL [N], the teacher's cross entropy [N], and the gradient.

    The gradient of the logits [N, V] is None unless `gradient`.
    """
    temperature = how.temperature
    student, teacher_softmax = (
        _Softmax(logits[:, : part.columns], temperature),
        _Softmax(teacher[:, : part.columns], temperature),
    )
    column_N = labels_N - part.first
    here_N = (column_N >= 0) & (column_N < part.columns)
    column_N1 = torch.where(here_N, column_N, 0).unsqueeze(-1)
    labels = [torch.where(here_N, one.gather(-1, column_N1).squeeze(-1), 0.0) for one in (logits, teacher)]
    local = (*student.terms(), labels[0], *teacher_softmax.terms(), labels[1])
    terms = _over_ranks(torch.stack([one.to(student.peak_N.dtype) for one in local]), part.group)
    entropy_N, cold_N, best_N, warm_N = _log_sums(terms[:4], temperature)
    own_N, _, *teacher_softmax_sums = _log_sums(terms[4:], temperature)

    q_NV, log_q_NV = student.normalised(best_N, warm_N)
    p_NV, log_p_NV = teacher_softmax.normalised(*teacher_softmax_sums)
    # sum (q - p) is 0 over the whole vocabulary; with it, the roundings of both normalisations cancel.
    divergence_N = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1)
    gradient_NV = q_NV.sub_(p_NV)
    divergence_N = temperature**2 * (divergence_N + gradient_NV.sum(-1))
    if not gradient:
        return entropy_N, divergence_N, own_N, None
    gradient_NV.mul_(how.weight * temperature)
    kept = 1 - how.weight
    if kept and part.columns:
        if temperature != 1:
            log_q_NV.add_(warm_N.unsqueeze(-1)).mul_(temperature).sub_(cold_N.unsqueeze(-1))
        gradient_NV.add_(log_q_NV.exp_(), alpha=kept)
        gradient_NV.scatter_add_(-1, column_N1, here_N.to(q_NV.dtype).mul_(-kept).unsqueeze(-1))
    return entropy_N, divergence_N, own_N, gradient_NV


class _Softmax:
    """Softmax of one model's logits of a chunk in at least fp32. The largest is subtracted before the division by T."""

    def __init__(self, logits_NV: Tensor, temperature: float) -> None:
        wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        self.temperature = temperature
        # A rank whose columns are all padding contributes nothing.
        lowest = torch.finfo(wide.dtype).min
        self.peak_N = wide.amax(-1) if wide.shape[-1] else wide.new_full(wide.shape[:1], lowest)
        self.scaled_NV = (wide - self.peak_N.unsqueeze(-1)).div_(temperature)
        self.power_NV = self.scaled_NV.exp()
        self.sum_N = self.power_NV.sum(-1)

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest logit and the sums of exp(logit - largest) and of exp((logit - largest) / T), each [N]."""
        temperature = self.temperature
        cold_N = self.sum_N if temperature == 1 else (self.scaled_NV * temperature).exp_().sum(-1)
        return self.peak_N, cold_N, self.sum_N

    def normalised(self, best_N: Tensor, log_sum_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and their logarithms [N, V], given results of `_log_sums`. Overwrites the buffers."""
        offset_N1 = ((self.peak_N - best_N) / self.temperature - log_sum_N).unsqueeze(-1)
        return self.power_NV.mul_(offset_N1.exp()), self.scaled_NV.add_(offset_N1)


def _over_ranks(terms: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Gather terms [8, N] of every rank as eight tensors [ranks, N]."""
    if group is None or group.size() == 1:
        return terms.unsqueeze(1).unbind(0)
    parts = [torch.empty_like(terms) for _ in range(group.size())]
    dist.all_gather(parts, terms, group=group)
    return torch.stack(parts, 1).unbind(0)


def _log_sums(terms: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, ...]:
    """Combine the terms of all ranks and their labels' logits, each [ranks, N].

    Returns cross entropy, ln sum exp(logit - largest), largest logit, and ln sum exp((logit - largest) / T), each [N].
    """
    peak, cold, sums, label = terms
    best_N = peak.amax(0)
    cold_N = (cold * (peak - best_N).exp()).sum(0).log()
    warm_N = (sums * ((peak - best_N) / temperature).exp()).sum(0).log()
    return cold_N - (label.sum(0) - best_N), cold_N, best_N, warm_N
