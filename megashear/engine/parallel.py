"""Tensor-parallel layers of megatron-core, without random initialisation, and the base class of model chunks.

`model/load.py` fills the weights from a folder or from a seeded generator that does not depend on the layout. Layers
are therefore created uninitialised, with the attributes that megatron-core's initialisation would set.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig
from megashear.engine.startup import uses_cuda


class StageModule(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Base class of a model chunk in a pipeline. The first and last chunk may hold copies of a tied embedding."""

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self, config: TransformerConfig, pre_process: bool, post_process: bool, tied: bool, vp_stage: int | None
    ) -> None:
        """Set the attributes that megatron-core's schedules read.

        Args:
            config: Configuration of megatron-core.
            pre_process: The chunk embeds tokens.
            post_process: The chunk computes logits.
            tied: The output layer shares the embedding's weight.
            vp_stage: Index among the chunks of this rank, None without interleaving.
        """
        super().__init__(config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = tied
        self.input_tensor: Tensor | None = None

    @property
    def tied(self) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return self.share_embeddings_and_output_weights

    def set_input_tensor(self, tensors: list[Tensor | None] | Tensor | None) -> None:
        """Set the activations of the previous stage. Called by the schedules."""
        self.input_tensor = tensors[0] if isinstance(tensors, list) else tensors

    def embedding_weight(self) -> Tensor | None:
        """Return this chunk's copy of the tied embedding. Implemented by the model."""
        raise NotImplementedError

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return `embedding_weight` under the name that megatron-core's embedding reduction uses."""
        return self.embedding_weight()


CoreConfig = TransformerConfig


def transformer_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Build megatron-core's config for a model shape and a layout.

    `num_layers` is rounded up to a multiple of the number of chunks, because megatron-core checks it. Stages are built
    by `layout.stage_layers`, which accepts any number of layers.
    """
    parts = parallel.pipeline * parallel.virtual_pipeline
    return TransformerConfig(
        num_layers=-(-shape.num_layers // parts) * parts,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        use_cpu_initialization=not uses_cuda(),
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=uses_cuda() and gradient_fusion_available(),
        deterministic_mode=False,
        batch_p2p_comm=uses_cuda(),
    )


def gradient_fusion_available() -> bool:
    """Return whether Apex's kernel is installed that accumulates weight gradients into the fp32 buffer."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _no_initialisation(_: torch.Tensor) -> None:
    """Placeholder for an initialiser that megatron-core requires but never calls."""


def _mark(weight: torch.nn.Parameter, dim: int) -> None:
    tensor_parallel.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def column_parallel(inputs: int, outputs: int, config: TransformerConfig) -> tensor_parallel.ColumnParallelLinear:
    """Create a linear layer sharded by output features over tensor-parallel ranks, weight [outputs / TP, inputs]."""
    layer = tensor_parallel.ColumnParallelLinear(
        inputs, outputs, config=config, init_method=_no_initialisation, bias=False, gather_output=False
    )
    _mark(layer.weight, 0)
    return layer


def row_parallel(inputs: int, outputs: int, config: TransformerConfig) -> tensor_parallel.RowParallelLinear:
    """Create a linear layer sharded by input features over tensor-parallel ranks, weight [outputs, inputs / TP]."""
    layer = tensor_parallel.RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_no_initialisation,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    _mark(layer.weight, 1)
    return layer


def parallel_product(linear: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, fused: bool) -> torch.Tensor:
    """Apply a column- or row-parallel linear with another weight, of any number of rows and columns.

    Args:
        linear: The layer whose parallelism is used.
        x: Input, [S, B, inputs], sharded as the layer expects.
        weight: Weight used instead of the layer's, [rows, inputs].
        fused: Let a kernel, if available, accumulate the gradient into `weight.main_grad`.

    Returns:
        The output as the layer would return it.
    """
    column = isinstance(linear, tensor_parallel.ColumnParallelLinear)
    out: torch.Tensor = tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce(
        x,
        weight,
        None,
        gradient_accumulation_fusion=fused and linear.gradient_accumulation_fusion,
        allreduce_dgrad=column and linear.allreduce_dgrad,
        sequence_parallel=column and linear.sequence_parallel,
        tp_group=linear.tp_group,
    )
    if column:
        return out
    if linear.sequence_parallel:
        out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=linear.tp_group)
    else:
        out = mappings.reduce_from_tensor_model_parallel_region(out, group=linear.tp_group)
    return out


def vocab_embedding(rows: int, width: int, config: TransformerConfig) -> tensor_parallel.VocabParallelEmbedding:
    """Create an embedding sharded by rows over tensor-parallel ranks, with output [S, B, D] or [S / TP, B, D]."""
    layer = tensor_parallel.VocabParallelEmbedding(
        rows,
        width,
        init_method=_no_initialisation,
        config=config,
        reduce_scatter_embeddings=config.sequence_parallel,
    )
    _mark(layer.weight, 0)
    return layer


def output_layer(inputs: int, rows: int, config: TransformerConfig, own_weight: bool) -> Any:
    """Create the vocabulary-parallel output layer; without `own_weight`, calls pass the embedding's weight."""
    layer = tensor_parallel.ColumnParallelLinear(
        inputs,
        rows,
        config=config,
        init_method=_no_initialisation,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not own_weight,
    )
    if own_weight:
        _mark(layer.weight, 0)
    return layer


def mark_sequence_parallel(weight: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Sum the gradient of a replicated weight over tensor-parallel ranks under sequence parallelism."""
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def cross_entropy(log_sum: torch.Tensor, label_logit: torch.Tensor) -> torch.Tensor:
    """Compute the cross entropy per token over all tensor-parallel ranks, in nats.

    Args:
        log_sum: ln sum exp(logits) over this rank's part of the vocabulary.
        label_logit: The label's logit, or 0 if the label belongs to another rank.

    Returns:
        The loss, with the shape, dtype and device of `log_sum` and the same values on every tensor-parallel rank.
    """
    group = tensor_group()
    if group.size() == 1:
        return log_sum - label_logit
    return _CrossEntropyOverRanks.apply(log_sum, label_logit, group)


class _CrossEntropyOverRanks(torch.autograd.Function):
    """ln of the sum over ranks of exp(log_sum), minus the sum over ranks of label_logit."""

    apply: ClassVar[Callable[..., torch.Tensor]]  # untyped in torch

    @staticmethod
    def forward(ctx: Any, log_sum: torch.Tensor, label_logit: torch.Tensor, group: Any) -> torch.Tensor:
        peak = log_sum.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack(((log_sum - peak).exp(), label_logit))
        dist.all_reduce(sums, group=group)
        total = peak + sums[0].log()
        ctx.save_for_backward((log_sum - total).exp())
        return total - sums[1]

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (share,) = ctx.saved_tensors
        return dloss * share, -dloss, None


def gather_features(x: torch.Tensor) -> torch.Tensor:
    """Concatenate the last dimension over tensor-parallel ranks. The gradient is reduce-scattered."""
    gathered: torch.Tensor = mappings.all_gather_last_dim_from_tensor_parallel_region(x)
    return gathered


def gather_logits(logits: torch.Tensor) -> torch.Tensor:
    """Gather all columns of vocabulary-parallel logits on every tensor-parallel rank."""
    gathered: torch.Tensor = mappings.gather_from_tensor_model_parallel_region(logits)
    return gathered


@torch.no_grad()
def gather_sequence(x: torch.Tensor) -> torch.Tensor:
    """Gather activations [S / TP, ..] to [S, ..] on every tensor-parallel rank, without gradients."""
    gathered: torch.Tensor = mappings.gather_from_sequence_parallel_region(x)
    return gathered


def tensor_group() -> Any:
    """Return the tensor-parallel process group."""
    return parallel_state.get_tensor_model_parallel_group()
