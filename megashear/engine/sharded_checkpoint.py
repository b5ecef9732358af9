"""Read and write sharded checkpoints with megatron-core's dist_checkpointing.

Each rank describes its part of every tensor. Descriptions do not depend on the layout (tensors by global layer,
optimizer state per weight), so a checkpoint loads on any tensor x pipeline x data layout. `checkpoint/` verifies
completeness; this module only reads and writes files.
"""

from pathlib import Path
from typing import Any, TypeAlias

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401  (imported before present_cpu)
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megashear.engine.device import present_cpu
from megashear.engine.optimizer import WeightOptimizer, unwrap
from megashear.engine.patches import end_results_queue_with_rank, separate_step_counts, use_fused_adam

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory
# Errors that writing raises besides OSError. torch's is raised if another rank failed.
WRITE_ERRORS = (CheckpointingException, CheckpointException)
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

# Sharding over tensor-parallel ranks by the suffix of a parameter's name. Norms are replicated.
ROWS = ("qkv.weight", "embedding.weight", "output.weight")
COLUMNS = ("out.weight", "down.weight")
GATE_UP = "gate_up.weight"


def sharded_parameter(name: str, parameter: torch.Tensor, copy_of_embedding: bool) -> Sharded:
    """Describe one parameter of `Llama`.

    Args:
        name: Global name of the parameter.
        parameter: This rank's part.
        copy_of_embedding: The parameter is the last stage's replica of a tied embedding.
    """
    data_rank = parallel_state.get_data_parallel_rank()
    if copy_of_embedding:
        return make_tp_sharded_tensor_for_checkpoint(
            parameter, "embedding.weight", tp_axis=0, replica_id=(1, 0, data_rank), allow_shape_mismatch=True
        )
    if name.endswith(ROWS):
        padded = not name.startswith("layers.")
        return make_tp_sharded_tensor_for_checkpoint(parameter, name, tp_axis=0, allow_shape_mismatch=padded)
    if name.endswith(COLUMNS):
        return make_tp_sharded_tensor_for_checkpoint(parameter, name, tp_axis=1)
    if name.endswith(GATE_UP):
        return apply_swiglu_sharded_factory(make_tp_sharded_tensor_for_checkpoint(parameter, name, tp_axis=0), ())
    return make_sharded_tensor_for_checkpoint(parameter, name)


def sharded_weights(chunks: list[torch.nn.Module]) -> dict[str, Sharded]:
    """Describe all parameters of this rank's chunks, by name."""
    described = {}
    for chunk in chunks:
        module = unwrap(chunk)
        for name, parameter in module.named_parameters():
            copy = name == "output.weight" and module.share_embeddings_and_output_weights
            described[name] = sharded_parameter(name, parameter, copy)
    return described


def sharded_state(weights: WeightOptimizer, is_loading: bool) -> dict[str, Any]:
    """Describe the weights and optimizer state of this rank for dist_checkpointing."""
    weights.ensure_state()
    model = sharded_weights(weights.chunks)
    optimizer = weights.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
    return {"model": model, "optimizer": optimizer}


def save(weights: WeightOptimizer, folder: Path) -> None:
    """Write weights and optimizer state into an existing empty folder. Collective over all ranks."""
    present_cpu()
    end_results_queue_with_rank()
    dist_checkpointing.save(sharded_state(weights, is_loading=False), str(folder))


def load(weights: WeightOptimizer, folder: Path) -> None:
    """Load weights and optimizer state written by `save` on any layout. Collective over all ranks."""
    present_cpu()
    state = dist_checkpointing.load(sharded_state(weights, is_loading=True), str(folder))
    with torch.no_grad():
        for chunk in weights.chunks:
            module = unwrap(chunk)
            for name, parameter in module.named_parameters():
                parameter.copy_(state["model"][name])
    weights.optimizer.load_state_dict(state["optimizer"])
    for part in weights.parts:
        use_fused_adam(part)
        separate_step_counts(part)
