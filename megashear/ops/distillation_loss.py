"""A teacher's distribution in the loss of each token: KL of logits beside cross entropy, over parts of a vocabulary.

    loss = (1 - w) * cross entropy(student) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))

(Hinton et al. 2015, section 2). Key properties: fp32 exists for `chunk` tokens at a time; the student's logits are
overwritten by their gradient while the teacher's are there, so these are computed once; the vocabulary may be spread
over ranks, which exchange eight numbers per token and chunk, and one more per token. Shape suffixes: N tokens of a
chunk, V this rank's columns of the vocabulary that are not padding. Read next: `../model/distillation.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megashear.config.resolve import DistillationPlan

TeacherLogits = Callable[[int, int], Tensor]
"""Gives the teacher's logits [stop - start, columns] of tokens start .. stop, over the same part of the vocabulary."""


@dataclass(frozen=True)
class VocabularyPart:
    """This rank's columns: the vocabulary's from `first` on, the first `columns` of them real, spread over `group`."""

    first: int
    columns: int
    group: dist.ProcessGroup | None = None


def distillation_losses(
    logits: Tensor, labels: Tensor, teacher: TeacherLogits, how: DistillationPlan, part: VocabularyPart
) -> Tensor:
    """Four numbers per token in nats, [4, ..] in at least fp32: the loss above, cross entropy, T^2 KL, and the
    teacher's own cross entropy.

    logits: [.., columns] of any floating dtype, this rank's part; labels: int64 [..]. Only the first of the four has a
    gradient. It is written over the logits here already (where they are contiguous), for a loss that counts each token
    once; the backward, which can run once, scales it by what each token counts. Tokens are in the order of
    `logits.flatten(0, -2)`; every rank of the group calls, and gets the same bits.
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
        assert rows is not None, "the gradient of a distilled loss can be taken once: it stands in the logits' place"
        for part, counts in zip(rows.split(ctx.chunk), dlosses[0].reshape(-1, 1).split(ctx.chunk), strict=True):
            part.copy_(part.to(counts.dtype) * counts)
        return rows.view(ctx.shape), None, None, None, None


def _chunk(
    logits: Tensor, labels_N: Tensor, teacher: Tensor, how: DistillationPlan, part: VocabularyPart, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cross entropy [N], this rank's addends of T^2 KL [N], the teacher's cross entropy [N], and with `gradient` the
    logits' gradient [N, V].
    """
    heat = how.temperature
    student, taught = _Softmax(logits[:, : part.columns], heat), _Softmax(teacher[:, : part.columns], heat)
    column_N = labels_N - part.first
    here_N = (column_N >= 0) & (column_N < part.columns)
    column_N1 = torch.where(here_N, column_N, 0).unsqueeze(-1)
    labels = [torch.where(here_N, one.gather(-1, column_N1).squeeze(-1), 0.0) for one in (logits, teacher)]
    local = (*student.terms(), labels[0], *taught.terms(), labels[1])
    terms = _over_ranks(torch.stack([one.to(student.peak_N.dtype) for one in local]), part.group)
    entropy_N, cold_N, best_N, warm_N = _log_sums(terms[:4], heat)
    own_N, _, *taught_sums = _log_sums(terms[4:], heat)

    q_NV, log_q_NV = student.normalised(best_N, warm_N)
    p_NV, log_p_NV = taught.normalised(*taught_sums)
    # sum (q - p) is 0 over the whole vocabulary; with it, the roundings of both normalisations cancel.
    divergence_N = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1)
    gradient_NV = q_NV.sub_(p_NV)
    divergence_N = heat**2 * (divergence_N + gradient_NV.sum(-1))
    if not gradient:
        return entropy_N, divergence_N, own_N, None
    gradient_NV.mul_(how.weight * heat)
    kept = 1 - how.weight
    if kept and part.columns:
        if heat != 1:
            log_q_NV.add_(warm_N.unsqueeze(-1)).mul_(heat).sub_(cold_N.unsqueeze(-1))
        gradient_NV.add_(log_q_NV.exp_(), alpha=kept)
        gradient_NV.scatter_add_(-1, column_N1, here_N.to(q_NV.dtype).mul_(-kept).unsqueeze(-1))
    return entropy_N, divergence_N, own_N, gradient_NV


class _Softmax:
    """One model's logits of a chunk in at least fp32, their largest subtracted before they are divided by T."""

    def __init__(self, logits_NV: Tensor, temperature: float) -> None:
        wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        self.temperature = temperature
        # A rank whose columns are all padding counts nothing.
        lowest = torch.finfo(wide.dtype).min
        self.peak_N = wide.amax(-1) if wide.shape[-1] else wide.new_full(wide.shape[:1], lowest)
        self.scaled_NV = (wide - self.peak_N.unsqueeze(-1)).div_(temperature)
        self.power_NV = self.scaled_NV.exp()
        self.sum_N = self.power_NV.sum(-1)

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logit, and the sums of exp(logit - largest) and of exp((logit - largest) / T), each [N]."""
        heat = self.temperature
        cold_N = self.sum_N if heat == 1 else (self.scaled_NV * heat).exp_().sum(-1)
        return self.peak_N, cold_N, self.sum_N

    def normalised(self, best_N: Tensor, log_sum_N: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and their logarithms [N, V], given what `_log_sum` gives; in the place of what was held."""
        offset_N1 = ((self.peak_N - best_N) / self.temperature - log_sum_N).unsqueeze(-1)
        return self.power_NV.mul_(offset_N1.exp()), self.scaled_NV.add_(offset_N1)


def _over_ranks(terms: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Every rank's terms: of terms [8, N] eight [ranks, N]."""
    if group is None or group.size() == 1:
        return terms.unsqueeze(1).unbind(0)
    parts = [torch.empty_like(terms) for _ in range(group.size())]
    dist.all_gather(parts, terms, group=group)
    return torch.stack(parts, 1).unbind(0)


def _log_sums(terms: tuple[Tensor, ...], heat: float) -> tuple[Tensor, ...]:
    """One model's cross entropy, ln of the sum of exp(logit - largest), largest logit, and ln of the sum of
    exp((logit - largest) / T), each [N]; from the terms of all ranks and their labels' logits, each [ranks, N].
    """
    peak, cold, sums, label = terms
    best_N = peak.amax(0)
    cold_N = (cold * (peak - best_N).exp()).sum(0).log()
    warm_N = (sums * ((peak - best_N) / heat).exp()).sum(0).log()
    return cold_N - (label.sum(0) - best_N), cold_N, best_N, warm_N
