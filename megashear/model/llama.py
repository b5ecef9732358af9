"""LLaMA as a chunk of pipeline stages: embedding, decoder layers, final norm, output layer, loss.

Every generation: multi-head or grouped-query attention, explicit head size, tied or untied embeddings, rotary
scaling. The vocabulary is padded for tensor parallelism; padding columns never get probability. Masked forward:
Sheared LLaMA, section 2.1, with the embedding masked too (`exact`), so that the masked model equals the pruned one.
Legend: see `layer.py`.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megashear import ops
from megashear.config.shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.module import StageModule
from megashear.engine.parallel import CoreConfig, cross_entropy, output_layer, vocab_embedding
from megashear.masks.masks import Masks
from megashear.model.layer import Layer, Norm
from megashear.model.masking import stage_masks


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
        if self.pre_process:
            return self.embedding.weight
        return self.output.weight if self.post_process and self.tied else None

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None, masks: Masks | None = None) -> Tensor:
        """Losses per token [B, S] in fp32 with labels; logits [S, B, V / TP] without; activations [S, B, D] before
        the last stage.
        """
        stage = stage_masks(masks, self.shape, self.layout, self.layer_range, self.config.params_dtype)
        if self.pre_process:
            x_SBD = self.embed(tokens_BS, stage.hidden if self.mask_embedding else None)
        else:
            assert self.input_tensor is not None
            x_SBD = self.input_tensor
        rope = self.rope(tokens_BS.shape[1])
        for layer, layer_masks in zip(self.layers.values(), stage.layers, strict=True):
            if self.recompute and self.training:
                x_SBD = checkpoint(layer, x_SBD, rope, layer_masks, use_reentrant=False, preserve_rng_state=False)
            else:
                x_SBD = layer(x_SBD, rope, layer_masks)
        if not self.post_process:
            return x_SBD
        logits_SBV = self.logits(self.norm(x_SBD, stage.hidden))
        if labels_BS is None:
            return logits_SBV
        return cross_entropy(logits_SBV, labels_BS.transpose(0, 1).contiguous()).transpose(0, 1)

    def embed(self, tokens_BS: Tensor, mask_D: Tensor | None) -> Tensor:
        """Token embeddings [S, B, D] (split by sequence under sequence parallelism), times the hidden mask."""
        x = self.embedding(tokens_BS)
        x_SBD = x if self.config.sequence_parallel else x.transpose(0, 1).contiguous()
        return x_SBD if mask_D is None else x_SBD * mask_D.to(x_SBD.dtype)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 .. length - 1, in fp32."""
        if self._rope is None or len(self._rope[0]) != length:
            shape = self.shape
            self._rope = ops.rope_tables(
                shape.head_dim, length, shape.rope_theta, shape.rope_scaling, self.layout.device
            )
        return self._rope

    def logits(self, x_SBD: Tensor) -> Tensor:
        """Vocabulary-parallel logits [S, B, V / TP]; padding columns hold the dtype's smallest number."""
        weight = self.embedding.weight if self.tied and self.pre_process else None
        logits_SBV = self.output(x_SBD, weight=weight)[0]
        columns = logits_SBV.shape[-1]
        real = min(max(self.shape.vocab_size - self.layout.tensor_rank * columns, 0), columns)
        if real == columns:
            return logits_SBV
        padding = torch.arange(columns, device=logits_SBV.device) >= real
        return logits_SBV.masked_fill(padding, torch.finfo(logits_SBV.dtype).min)
