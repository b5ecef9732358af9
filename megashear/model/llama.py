"""LLaMA as a chunk of a pipeline stage: embedding, decoder layers, final norm, output layer, loss.

Supports multi-head and grouped-query attention, explicit head size, tied and untied embeddings, and rotary scaling. The
vocabulary is padded for tensor parallelism; padding columns never get probability. The masked forward pass is that of
Sheared LLaMA, section 2.1, with the embedding masked too (`exact`), so that masked and pruned model are equal.

`TeacherTargets` keeps the teacher's final states [S, B, D]; its logits exist for one chunk of tokens at a time.
Gradients in bf16 are added to megatron-core's fp32 buffers in one pass, with the same bits as its own hook.
Shape suffixes: see `transformer_layer.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megashear import ops
from megashear.config.model_shape import ModelShape
from megashear.config.resolve import DistillationPlan
from megashear.engine.layout import Layout
from megashear.engine.parallel import (
    CoreConfig,
    StageModule,
    cross_entropy,
    output_layer,
    tensor_group,
    vocab_embedding,
)
from megashear.masks.mask_values import Masks
from megashear.model.live_units import WHOLE, LivePattern, LivePlanner, live_product
from megashear.model.masking import StageMasks, stage_masks
from megashear.model.transformer_layer import Layer, Norm, Stream
from megashear.ops.distillation_loss import VocabularyPart, distillation_losses


def accumulate_in_one_pass(module: nn.Module) -> None:
    """Have every parameter that is not fp32 give its gradient to its buffer `main_grad`, where it has one."""
    for parameter in module.parameters():
        if parameter.dtype != torch.float32:
            parameter.register_post_accumulate_grad_hook(_add_to_buffer)


def _add_to_buffer(parameter: Tensor) -> None:
    total, gradient = getattr(parameter, "main_grad", None), parameter.grad
    if total is None or gradient is None or total.dtype != torch.float32:
        return
    width = parameter.shape[-1]
    ops.live_add(total.view(-1, width), None, None, gradient.reshape(-1, width))
    parameter.grad = None


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's normalised final states of every position [S, B, D], its output layer's rows on this rank
    [V / TP, D], and how it enters the loss.
    """

    states_SBD: Tensor
    output_VD: Tensor
    how: DistillationPlan

    def logits(self, start: int, stop: int) -> Tensor:
        """Vocabulary-parallel logits [stop - start, V / TP] of tokens counted position by position (S outside B)."""
        return F.linear(self.states_SBD.flatten(0, 1)[start:stop], self.output_VD)


class Llama(StageModule):
    """The layers of one model chunk; the first chunk embeds tokens, the last one gives logits or losses."""

    def __init__(
        self,
        shape: ModelShape,
        config: CoreConfig,
        layout: Layout,
        layers: range,
        pre_process: bool,
        post_process: bool,
        mask_embedding: bool = True,
        recompute: bool = False,
        vp_stage: int | None = None,
    ) -> None:
        """layers: global indices of this chunk's layers. mask_embedding: `exact` masking. recompute: layers again in
        backward.
        """
        super().__init__(config, pre_process, post_process, shape.tie_word_embeddings, vp_stage)
        self.shape, self.layout, self.layer_range = shape, layout, layers
        self.mask_embedding, self.recompute = mask_embedding, recompute
        self.planner = LivePlanner(shape, layout, layers)
        self._rope: tuple[Tensor, Tensor] | None = None
        rows = shape.padded_vocab_size(layout.tensor_size)
        # Named by global index, so that names are unique over chunks and the same in every layout.
        self.layers = nn.ModuleDict({str(index): Layer(shape, config, layout) for index in layers})
        if pre_process:
            self.embedding = vocab_embedding(rows, shape.hidden_size, config)
        if post_process:
            self.norm = Norm(shape.hidden_size, shape.norm_eps, config, layout.device)
            # A tied model on several stages holds a copy on the last one, kept equal by megatron-core's embedding
            # group.
            self.output = output_layer(shape.hidden_size, rows, config, own_weight=not (self.tied and pre_process))
        self._mark_tied_weights()
        accumulate_in_one_pass(self)

    def _mark_tied_weights(self) -> None:
        """Have megatron-core sum the gradients of the copies on two stages, and count the weight once in the norm."""
        if not self.tied or self.layout.pipeline_size == 1:
            return
        if self.pre_process:
            self.embedding.weight.shared_embedding = True
        if self.post_process and not self.pre_process:
            self.output.weight.shared = True
            self.output.weight.shared_embedding = True

    def embedding_weight(self) -> Tensor | None:
        """The tied weight of this chunk, if it holds a copy."""
        weight: Tensor | None = None
        if self.pre_process:
            weight = self.embedding.weight
        elif self.post_process and self.tied:
            weight = self.output.weight
        return weight

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        masks: Masks | None = None,
        pattern: LivePattern | None = None,
        first_BS: Tensor | None = None,
        targets: TeacherTargets | None = None,
    ) -> Tensor:
        """Losses per token [B, S] in fp32 with labels; logits [S, B, V / TP] without; activations [S, B, D] before
        the last stage. With a teacher's targets [4, B, S]: see `distilled_losses`.

        pattern: the zeros of `masks`, of which nothing is computed then; None computes everything. first_BS: int32
        [B, S], the first position that each token attends to, that of its document; None: 0.
        """
        stage = self.stage(masks, pattern)
        x_SBD = self._states(tokens_BS, stage, first_BS)
        if not self.post_process:
            return x_SBD
        logits_SBV = self.logits(x_SBD, stage.live_hidden)
        if labels_BS is None:
            return self.without_padding(logits_SBV)
        if targets is None:
            return self.losses(logits_SBV, labels_BS)
        return self.distilled_losses(logits_SBV, labels_BS, targets)

    def states(self, tokens_BS: Tensor, first_BS: Tensor | None = None) -> Tensor:
        """Without masks: the normalised states [S, B, D] that the output layer takes, or what the next stage takes."""
        return self._states(tokens_BS, self.stage(None, None), first_BS)

    def stage(self, masks: Masks | None, pattern: LivePattern | None) -> StageMasks:
        """What this chunk needs of the masks, and of which nothing is computed."""
        live = self.planner(pattern or WHOLE)
        dtype = self.config.params_dtype
        return stage_masks(masks or Masks(), live, self.shape, self.layout, self.layer_range, dtype)

    def _states(self, tokens_BS: Tensor, stage: StageMasks, first_BS: Tensor | None) -> Tensor:
        """The live dimensions of the normalised final states, or what the next stage receives."""
        stream = Stream(self.enter(tokens_BS, stage))
        rope = self.rope(tokens_BS.shape[1])
        for layer, layer_masks in zip(self.layers.values(), stage.layers, strict=True):
            if self.recompute and self.training:
                stream = checkpoint(
                    layer, stream, rope, layer_masks, first_BS, use_reentrant=False, preserve_rng_state=False
                )
            else:
                stream = layer(stream, rope, layer_masks, first_BS)
        if not self.post_process:
            return self.leave(stream.total(), stage)
        states: Tensor = self.norm(stream, stage.norm, stage.live_hidden)[1]
        return states

    def enter(self, tokens_BS: Tensor, stage: StageMasks) -> Tensor:
        """The residual stream [S, B, live D] at the chunk's start: masked embeddings, or the last stage's activations.

        Under sequence parallelism split by sequence.
        """
        if not self.pre_process:
            assert self.input_tensor is not None
            return self.input_tensor if stage.live_hidden is None else self.input_tensor[..., stage.live_hidden]
        x: Tensor = self.embedding(tokens_BS)
        x_SBD = x if self.config.sequence_parallel else x.transpose(0, 1).contiguous()
        if stage.live_hidden is not None:
            x_SBD = x_SBD.index_select(-1, stage.live_hidden)
        if stage.hidden is None or not self.mask_embedding:
            return x_SBD
        return x_SBD * stage.hidden.to(x_SBD.dtype)

    def leave(self, x_SBD: Tensor, stage: StageMasks) -> Tensor:
        """What the next stage receives, [S, B, D]: dimensions that no mask lets through are zeros."""
        if stage.live_hidden is not None:
            whole = x_SBD.new_zeros(*x_SBD.shape[:-1], self.shape.hidden_size)
            return whole.index_copy(-1, stage.live_hidden, x_SBD)
        # A stage whose layers are all dead hands on a tensor of its own: the schedules free and differentiate it.
        return x_SBD.clone() if x_SBD is self.input_tensor else x_SBD

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 .. length - 1, in fp32."""
        if self._rope is None or len(self._rope[0]) != length:
            shape = self.shape
            self._rope = ops.rope_tables(
                shape.head_dim, length, shape.rope_theta, shape.rope_scaling, self.layout.device
            )
        return self._rope

    def logits(self, x_SBD: Tensor, live_D: Tensor | None = None) -> Tensor:
        """Vocabulary-parallel logits [S, B, V / TP], whose last columns may be padding."""
        return live_product(self.output, x_SBD, None, live_D, self.output_weight())

    def output_weight(self) -> Tensor:
        """The output layer's rows on this rank [V / TP, D]: the embedding's where they are one tensor."""
        weight: Tensor = self.embedding.weight if self.tied and self.pre_process else self.output.weight
        return weight

    def real_columns(self, width: int) -> int:
        """How many of this rank's `width` columns of the vocabulary are not padding."""
        return min(max(self.shape.vocab_size - self.layout.tensor_rank * width, 0), width)

    def without_padding(self, logits_SBV: Tensor) -> Tensor:
        """Logits whose padding columns hold the dtype's smallest number."""
        width = logits_SBV.shape[-1]
        real = self.real_columns(width)
        if real == width:
            return logits_SBV
        padding = torch.arange(width, device=logits_SBV.device) >= real
        return logits_SBV.masked_fill(padding, torch.finfo(logits_SBV.dtype).min)

    def losses(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross entropy per token [B, S] in at least fp32; the backward overwrites the logits with their gradient."""
        width = logits_SBV.shape[-1]
        labels_SB = labels_BS.transpose(0, 1).contiguous()
        terms = ops.cross_entropy_terms(
            logits_SBV, labels_SB, self.layout.tensor_rank * width, self.real_columns(width), overwrite=True
        )
        return cross_entropy(*terms).transpose(0, 1)

    def distilled_losses(self, logits_SBV: Tensor, labels_BS: Tensor, targets: TeacherTargets) -> Tensor:
        """Mixed loss, cross entropy, T^2 KL and the teacher's cross entropy per token [4, B, S]; the logits are
        overwritten with their gradient.
        """
        width = logits_SBV.shape[-1]
        labels_SB = labels_BS.transpose(0, 1).contiguous()
        part = VocabularyPart(self.layout.tensor_rank * width, self.real_columns(width), tensor_group())
        return distillation_losses(logits_SBV, labels_SB, targets.logits, targets.how, part).transpose(1, 2)
