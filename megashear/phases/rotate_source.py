"""Rotate the source into the principal basis of its residual stream, if the run prunes hidden units there.

The rotated source is the model folder `principal` of the run, in the run's precision. It is computed once on
calibration text and removed after finalize, so every phase and layout reads the same weights.
"""

import logging

from megashear.config.resolve import in_principal_basis
from megashear.engine.collectives import on_main
from megashear.errors import TrainingError
from megashear.evaluation.heldout import evaluate_heldout
from megashear.evaluation.losses import mean_loss
from megashear.files.atomic import atomic_folder
from megashear.hf.finish_folder import seal_folder, write_settings
from megashear.hf.model_folder import ModelFolder
from megashear.hf.safetensors_writer import ShardedWriter
from megashear.hf.tensor_names import FINAL_NORM, tensor_shapes
from megashear.importance.principal_basis import (
    ResidualStream,
    massive_units,
    principal_basis,
    residual_stream,
    share_kept,
    turned_norm,
    unlike_units,
)
from megashear.masks.rotation import Rotation
from megashear.mixture.loader import HeldOut
from megashear.model.weight_io import RandomWeights, TensorSource
from megashear.phases.calibration import NONFINITE_ADVICE, build_source, calibration_progress, calibration_text
from megashear.phases.run_folder import Context
from megashear.phases.source_losses import open_heldout, source_losses

PRINCIPAL_FOLDER = "principal"
MAX_LOSS_CHANGE = 0.05
"""Nats per token by which the turn may change the mean held-out loss without a warning."""
logger = logging.getLogger(__name__)


def principal(context: Context) -> bool:
    """Whether the run prunes hidden units along the source's principal directions."""
    assert context.target_shape is not None
    return in_principal_basis(context.config.prune, context.source_shape, context.target_shape)


def pruning_source(context: Context) -> TensorSource:
    """Weights that pruning starts from. Call it on every rank. Raises Interrupted if a stop was requested."""
    if principal(context):
        return pruning_folder(context)
    return RandomWeights(context.source_shape, context.config.run.seed) if context.source is None else context.source


def pruning_folder(context: Context) -> ModelFolder:
    """Model folder that pruning starts from; see `pruning_source`."""
    if not principal(context):
        assert context.source is not None
        return context.source
    if not on_main(context.layout, context.model_folder(PRINCIPAL_FOLDER).exists):
        _rotate(context)
    return context.open_model(PRINCIPAL_FOLDER)


def _rotate(context: Context) -> None:
    prune = context.config.prune
    source = context.source or RandomWeights(context.source_shape, context.config.run.seed)
    chunks, heldout = build_source(context, source), open_heldout(context, prune.batch.eval_sequences)
    before = source_losses(context, "prune", chunks, prune.batch.micro_batch, None)
    stream = residual_stream(
        chunks,
        context.layout,
        calibration_text(context),
        prune.importance.batches,
        prune.batch.global_batch,
        calibration_progress(context, "principal basis", prune.importance.batches),
    )
    if not bool(stream.covariance_DD.isfinite().all()):
        raise TrainingError(f"principal basis: the source's activations are not finite numbers; {NONFINITE_ADVICE}")
    on_main(context.layout, lambda: _write(context, source, stream))
    del chunks
    if before is not None:
        _compare(context, heldout, mean_loss(before))


def _compare(context: Context, heldout: HeldOut, before: float) -> None:
    """Print the held-out loss before and after the rotation."""
    chunks = build_source(context, context.open_model(PRINCIPAL_FOLDER))
    with context.evaluating():
        after = mean_loss(
            evaluate_heldout(heldout, context.layout, list(chunks), context.config.prune.batch.micro_batch)
        )
    if context.layout.is_main:
        print(f"principal basis: mean held-out loss {after:.4f} after the turn, {before:.4f} before", flush=True)
    if not abs(after - before) <= MAX_LOSS_CHANGE:
        change = after - before
        logger.warning("principal basis: the turn changed the held-out loss by %+.3f; try prune.basis: source", change)


def _write(context: Context, source: TensorSource, stream: ResidualStream) -> None:
    assert context.target_shape is not None
    shapes, kept = tensor_shapes(context.source_shape), context.target_shape.hidden_size
    axes_D, norm_D = massive_units(stream.peak_D), None
    if context.source_shape.tie_word_embeddings:
        norm_D = source.read_slice(FINAL_NORM, 0, 0, len(axes_D)).to(stream.peak_D)
        axes_D |= unlike_units(norm_D)
    variance_D, basis_DD = principal_basis(stream.covariance_DD, axes_D)
    print(
        f"principal basis: {kept} of {len(variance_D)} hidden units hold {share_kept(variance_D, kept):.1%} of the "
        f"residual stream's variance (of the source's own units {share_kept(stream.covariance_DD.diag(), kept):.1%}); "
        f"{int(axes_D.sum())} of the source's stay as they are",
        flush=True,
    )
    if context.layout.device.type != "cpu":
        basis_DD = basis_DD.float()
    final_norm_D = None if norm_D is None else turned_norm(norm_D.to(basis_DD), axes_D, basis_DD)
    rotation = Rotation(basis_DD, lambda name: source.read_slice(name, 0, 0, shapes[name][0]), final_norm_D)
    with atomic_folder(context.model_folder(PRINCIPAL_FOLDER)) as temporary:
        with ShardedWriter.create(temporary, shapes, context.dtype) as writer:
            for name in shapes:
                writer.write(name, rotation(name).to(context.dtype).cpu())
        write_settings(
            temporary, context.source_shape, context.dtype, context.hf_config(), context.tokenizer_and_license_files()
        )
        seal_folder(temporary, {"basis": PRINCIPAL_FOLDER})
