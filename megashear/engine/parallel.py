"""The base of a model chunk: what megatron-core's schedules and reductions ask of a module.

Parallel layers: megatron-core's, without their random initialisation.

Weights are filled by `model/load.py`, from a folder or from a seeded generator that does not know the layout; so
layers are made empty here, and the marks that megatron-core's initialisation would have set are set here.
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
from megashear.engine.device import uses_cuda


class StageModule(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """A module that runs as part of a pipeline; its first and last chunk may hold copies of one tied embedding."""

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self, config: TransformerConfig, pre_process: bool, post_process: bool, tied: bool, vp_stage: int | None
    ) -> None:
        """pre_process, post_process: whether this chunk embeds tokens, computes logits. vp_stage: its number among
        the rank's chunks.
        """
        super().__init__(config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = tied
        self.input_tensor: Tensor | None = None

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.share_embeddings_and_output_weights

    def set_input_tensor(self, tensors: list[Tensor | None] | Tensor | None) -> None:
        """Take the previous stage's activations (called by the schedules)."""
        self.input_tensor = tensors[0] if isinstance(tensors, list) else tensors

    def embedding_weight(self) -> Tensor | None:
        """This chunk's copy of the tied embedding; to be given by the model."""
        raise NotImplementedError

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The same under the name that megatron-core's reduction between first and last stage asks for."""
        return self.embedding_weight()


CoreConfig = TransformerConfig


def transformer_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's config for a shape and a layout.

    `num_layers` is rounded up to what the pipeline divides: megatron-core checks it although our stages are built by
    `layout.stage_layers`, which needs no such thing.
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
    """NVIDIA Apex's kernel that adds weight gradients into the fp32 buffer inside the product."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _no_initialisation(_: torch.Tensor) -> None:
    """Stand in where megatron-core asks for an initialiser that it never calls."""


def _mark(weight: torch.nn.Parameter, dim: int) -> None:
    tensor_parallel.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def column_parallel(inputs: int, outputs: int, config: TransformerConfig) -> tensor_parallel.ColumnParallelLinear:
    """A linear layer whose output features are spread over tensor-parallel ranks (weight [outputs / TP, inputs])."""
    layer = tensor_parallel.ColumnParallelLinear(
        inputs, outputs, config=config, init_method=_no_initialisation, bias=False, gather_output=False
    )
    _mark(layer.weight, 0)
    return layer


def row_parallel(inputs: int, outputs: int, config: TransformerConfig) -> tensor_parallel.RowParallelLinear:
    """A linear layer whose input features are spread over tensor-parallel ranks (weight [outputs, inputs / TP])."""
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
    """What a column- or row-parallel linear gives with a weight in place of its own, of any number of rows and columns.

    fused: let a kernel, where there is one, add the gradient into the weight's own buffer (`weight.main_grad`).
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
    """An embedding whose rows are spread over tensor-parallel ranks; its output is [S, B, D], or [S / TP, B, D]."""
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
    """The vocabulary-parallel output layer; without a weight of its own it is given the embedding's."""
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
    """Have the gradient of a replicated weight summed over tensor-parallel ranks when activations are split by
    sequence.
    """
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def cross_entropy(log_sum: torch.Tensor, label_logit: torch.Tensor) -> torch.Tensor:
    """Cross entropy per token in nats, of the terms' shape, dtype and device, the same on every tensor-parallel rank.

    log_sum, label_logit: ln sum exp(logits), and the label's logit or 0, over this rank's part of the vocabulary.
    """
    group = tensor_group()
    if group.size() == 1:
        return log_sum - label_logit
    return _CrossEntropyOverRanks.apply(log_sum, label_logit, group)


class _CrossEntropyOverRanks(torch.autograd.Function):
    """ln of the sum over ranks of exp(log_sum), less the sum over ranks of label_logit."""

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
    """All tensor-parallel ranks' last dimensions side by side; the gradient is summed over ranks and scattered back."""
    gathered: torch.Tensor = mappings.all_gather_last_dim_from_tensor_parallel_region(x)
    return gathered


def gather_logits(logits: torch.Tensor) -> torch.Tensor:
    """All columns of vocabulary-parallel logits on every tensor-parallel rank."""
    gathered: torch.Tensor = mappings.gather_from_tensor_model_parallel_region(logits)
    return gathered


@torch.no_grad()
def gather_sequence(x: torch.Tensor) -> torch.Tensor:
    """Activations split by sequence, [S / TP, ..], whole on every tensor-parallel rank, [S, ..]; without gradients."""
    gathered: torch.Tensor = mappings.gather_from_sequence_parallel_region(x)
    return gathered


def tensor_group() -> Any:
    """The tensor-parallel process group."""
    return parallel_state.get_tensor_model_parallel_group()
