"""Set up, resume and run a training phase, `prune` or `pretrain`."""

import logging
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megashear.checkpoint.checkpoint_store import load_checkpoint, newest_valid, save_checkpoint
from megashear.config.model_shape import ModelShape
from megashear.config.resolve import DistillationPlan, peak_learning_rate, teacher_flops_per_token
from megashear.config.schema import PHASES
from megashear.config.training_schema import BatchConfig, PretrainConfig, PruneConfig
from megashear.engine.collectives import on_main
from megashear.engine.device import device_name
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.errors import CheckpointError, ConfigError
from megashear.evaluation.losses import Losses, from_json, mean_loss, to_json
from megashear.masks.mask_optimizer import MaskOptimizer, build_mask_optimizer
from megashear.mixture.blend import BlendedStream, sources
from megashear.mixture.domain_weights import Mixture
from megashear.mixture.loader import Batches, Loader
from megashear.mixture.reference_losses import reference_losses
from megashear.model.micro_batch import local_rows
from megashear.model.weight_io import RandomWeights, TensorSource, filled_chunks, write_model
from megashear.phases.attention_choice import choose_attention_backend
from megashear.phases.moments import drop_moments, take_moments, write_moments
from megashear.phases.rotate_source import principal, pruning_source
from megashear.phases.run_folder import Context
from megashear.phases.score_units import calibration_record, importance_scores
from megashear.phases.source_losses import open_heldout, source_losses
from megashear.train.callbacks import (
    AttentionBackendLog,
    Checkpoints,
    DistillationStop,
    FrozenMasksLog,
    HeldOutEvaluation,
    StepLog,
    StopOnSignal,
)
from megashear.train.divergence_watch import DivergenceWatch
from megashear.train.loop import train
from megashear.train.metrics import Metrics
from megashear.train.profiler import profiler
from megashear.train.progress import Progress
from megashear.train.step import Stepper
from megashear.train.teacher import Teacher
from megashear.train.training_phase import Callback, Counters, Phase

logger = logging.getLogger(__name__)


def run_training(context: Context, name: str) -> None:
    """Run the phase `prune` or `pretrain` from its newest checkpoint or its start, and write its model.

    `prune` writes the model folder `masked` (in the source's shape, for `finalize`), `pretrain` writes `final`.
    """
    config = context.config
    section = config.prune if name == "prune" else config.pretrain
    shape = context.target_shape if name == "pretrain" and context.target_shape is not None else context.source_shape
    choose_attention_backend(context, shape, section.batch.micro_batch, masked=isinstance(section, PruneConfig))
    started, evaluated = time.monotonic(), context.evaluation_seconds
    scores = importance_scores(context) if name == "prune" else None
    calibrated = time.monotonic() - started - (context.evaluation_seconds - evaluated)
    weights = build_weights(context, section, shape, starting_point(context, name, shape))
    masks = None
    if isinstance(section, PruneConfig):
        assert context.target_shape is not None
        masks = build_mask_optimizer(shape, context.target_shape, section, config.run.seed, context.layout.device)
        if scores is not None:
            masks.warm_start(scores.units)
    metrics = Metrics(
        context.folder,
        config.logging.tensorboard,
        config.logging.wandb_project,
        context.folder.name,
        enabled=context.layout.is_main,
    )
    traced_steps = config.logging.profile_steps if context.layout.is_main else 0
    with metrics, profiler(context.folder / "profile" / f"{name}.json.gz", traced_steps) as profiling:
        phase = build_phase(context, name, section, shape, weights, masks, metrics)
        if masks is not None and not phase.counters.step:
            phase.counters.calibration_seconds = calibrated
        with closing(phase.batches):
            losses = train(phase, [*profiling, *training_callbacks(context)])
    undecided = [] if masks is None else phase.counters.undecided or masks.describe_undecided()
    if masks is not None and not masks.schedule.is_frozen(section.batch.steps):
        for problem in undecided:
            logger.warning("%s: masks undecided at the end: %s", name, problem)
    output = context.model_folder("masked" if name == "prune" else "final")
    record = phase_record(phase, losses)
    if masks is not None:
        record |= {"principal": principal(context), "undecided": undecided} | calibration_record(context)
    write_model(
        weights.chunks,
        shape,
        context.dtype,
        output,
        context.layout,
        context.hf_config(),
        context.tokenizer_and_license_files(),
        context.provenance([*earlier_records(context, name), record]),
    )
    if masks is not None:
        write_moments(context, weights, masks)
    times = {"seconds": phase.counters.seconds, "evaluation_seconds": phase.counters.evaluation_seconds}
    if masks is not None:
        times["calibration_seconds"] = phase.counters.calibration_seconds
    context.finish(name, record | times | {"stream": phase.stream.state_dict()})
    if name == "pretrain":
        drop_moments(context)


def training_callbacks(context: Context) -> list[Callback]:
    """Callbacks of a training phase, in order: logs, those of the caller, evaluation, checkpoint, stop."""
    checkpoints = Checkpoints(lambda phase: save_phase(context, phase), context.config.checkpoint.interval)
    return [
        AttentionBackendLog(),
        StepLog(),
        *context.callbacks,
        DistillationStop(),
        DivergenceWatch(),
        FrozenMasksLog(),
        HeldOutEvaluation(),
        checkpoints,
        StopOnSignal(context.stop, checkpoints),
    ]


def starting_point(context: Context, name: str, shape: ModelShape) -> TensorSource:
    """Initial weights of a phase: the pruned model, the source, or random weights from the seed.

    Raises:
        CheckpointError: Pre-training needs the pruned model, and finalize is not done.
    """
    if name == "pretrain" and context.target_shape is not None:
        if context.done("finalize") is None:
            raise CheckpointError(f"{context.folder}: not finalized; run `megashear finalize` (or `run`) first")
        return context.open_model("pruned")
    if name == "prune":
        return pruning_source(context)
    return RandomWeights(shape, context.config.run.seed) if context.source is None else context.source


def build_weights(
    context: Context, section: PruneConfig | PretrainConfig, shape: ModelShape, source: TensorSource
) -> WeightOptimizer:
    """Build the model on this rank with its weights, under its optimizer."""
    config, layout = context.config, context.layout
    core = transformer_config(shape, config.parallel, context.dtype)
    exact = not isinstance(section, PruneConfig) or section.masking == "exact"
    recompute = config.parallel.recompute == "full"
    modules = filled_chunks(shape, core, layout, source, exact, recompute)
    return WeightOptimizer(modules, section.optimizer, context.dtype, config.parallel.distributed_optimizer)


def build_phase(
    context: Context,
    name: str,
    section: PruneConfig | PretrainConfig,
    shape: ModelShape,
    weights: WeightOptimizer,
    masks: MaskOptimizer | None,
    metrics: Metrics,
) -> Phase:
    """Build the phase and load its newest checkpoint, if there is one."""
    config, layout, dataset = context.config, context.layout, context.dataset
    length, batch = config.data.sequence_length, section.batch
    heldout = open_heldout(context, batch.eval_sequences)
    checkpoint = on_main(layout, lambda: newest_valid(context.folder / name))
    before = source_losses(context, name, weights.chunks, batch.micro_batch, checkpoint)
    references = reference_losses(config.mixture, dataset.domains, _means(before))
    tokens = {domain: len(dataset.stream(domain)) for domain in dataset.domains}
    mixture = Mixture(config.mixture, tokens, references, batch.steps)
    if name == "pretrain":
        _start_pretraining_mixture(context, mixture)
    stream = open_stream(context, mixture)
    taken = resume_stream(context, stream) if name == "pretrain" else stream.tokens()
    counters, losses = Counters(), None
    if checkpoint is not None:
        counters, losses = resume_from(checkpoint, weights, masks, stream, mixture)
        if layout.is_main:
            print(f"{name}: resuming from {checkpoint}", flush=True)
    elif name == "pretrain":
        take_moments(context, weights)
    metrics.resume(name, counters.step)
    plan, flops = context.distillation_plans(name), shape.flops_per_token(length)
    teacher_flops = teacher_flops_per_token(context.source_shape, length) if plan.weight else 0.0
    if counters.distilled_steps is not None:  # distillation has stopped: do not load the teacher again
        plan = replace(plan, weight=0.0)
    stepper = build_stepper(context, section, weights, masks, plan)
    present_flops = flops + (teacher_flops if stepper.teacher is not None else 0.0)
    tokens_done = counters.step * batch.global_batch * length
    return Phase(
        name=name,
        batch=batch,
        optimizer=section.optimizer,
        learning_rate=peak_learning_rate(section.optimizer, (context.target_shape or context.source_shape).hidden_size),
        logging=config.logging,
        layout=layout,
        stepper=stepper,
        stream=stream,
        batches=open_batches(context, stream, batch),
        heldout=heldout,
        mixture=mixture,
        metrics=metrics,
        progress=Progress(
            name, batch.steps, present_flops, device_name(), layout.world_size, counters.step, tokens_done
        ),
        counters=counters,
        losses=losses,
        source_loss=None if before is None else mean_loss(before),
        earlier_tokens=taken,
        teacher_flops=teacher_flops / flops if teacher_flops else None,
    )


def resume_from(
    checkpoint: Path, weights: WeightOptimizer, masks: MaskOptimizer | None, stream: BlendedStream, mixture: Mixture
) -> tuple[Counters, Losses | None]:
    """Load a phase's checkpoint; returns its counters and last held-out losses."""
    state = load_checkpoint(checkpoint, weights, masks)
    stream.load_state_dict(state["stream"])
    mixture.load_state_dict(state["mixture"])
    return Counters(**state["counters"]), from_json(state["losses"])


def build_stepper(
    context: Context,
    section: PruneConfig | PretrainConfig,
    weights: WeightOptimizer,
    masks: MaskOptimizer | None,
    how: DistillationPlan,
) -> Stepper:
    """Build the stepper of the phase, with its teacher if it has one."""
    jointly = isinstance(section, PruneConfig) and section.clip == "joint"
    teacher = build_teacher(context, how)
    seed, clip = context.config.run.seed, section.optimizer.clip_norm
    return Stepper(context.layout, weights, masks, seed, section.batch.micro_batch, clip, jointly, teacher)


def open_stream(context: Context, mixture: Mixture) -> BlendedStream:
    """The run's stream of samples from its beginning, with the mixture's weights."""
    data, seed = context.config.data, context.config.run.seed
    windows = sources(context.dataset, data.sequence_length)
    return BlendedStream(windows, seed, mixture.weights, data.exhausted, data.repeat_limit)


def open_batches(context: Context, stream: BlendedStream, batch: BatchConfig) -> Batches:
    """This rank's part of the stream's batches, read ahead."""
    data, layout = context.config.data, context.layout
    loader = Loader(context.dataset, stream, data.sequence_length, data.separate_documents)
    rows = local_rows(batch.global_batch, layout, batch.micro_batch).numpy()
    return Batches(loader, rows, batch.global_batch, data.prefetch, layout.device.type == "cuda")


def resume_stream(context: Context, stream: BlendedStream) -> dict[str, int]:
    """Continue the stream where pruning ended, so that no sample repeats before its domain is used up.

    Keeps the stream's weights. Returns the tokens of each domain that pruning took; none without pruning.
    """
    pruned, weights = context.done("prune"), stream.weights
    if pruned is not None and "stream" in pruned:
        stream.load_state_dict(pruned["stream"])
        stream.set_weights(weights)
    return stream.tokens()


def _start_pretraining_mixture(context: Context, mixture: Mixture) -> None:
    """Set the weights at the start of pre-training: configured, else those at the end of pruning."""
    given = context.config.mixture.pretrain_weights
    pruned = context.done("prune")
    if given is not None:
        mixture.set_weights(given)
    elif pruned is not None:
        mixture.set_weights(pruned["weights"])


def _means(losses: Losses | None) -> dict[str, float] | None:
    return None if losses is None else {name: loss for name, (loss, _) in losses.items()}


def save_phase(context: Context, phase: Phase) -> None:
    """Write a checkpoint of a phase."""
    assert phase.losses is not None
    state = {
        "counters": asdict(phase.counters),
        "stream": phase.stream.state_dict(),
        "mixture": phase.mixture.state_dict(),
        "losses": to_json(phase.losses),
    }
    stepper = phase.stepper
    folder = context.folder / phase.name
    keep = context.config.checkpoint.keep
    save_checkpoint(folder, phase.counters.step, stepper.weights, stepper.mask_optimizer, state, context.layout, keep)


def phase_record(phase: Phase, losses: Losses) -> dict[str, Any]:
    """Record of a finished phase, for later phases, the model card and the final table."""
    return {
        "name": phase.name,
        "steps": phase.counters.step,
        "tokens": phase.tokens,
        "skipped": phase.counters.skipped,
        **loss_record(losses),
        "weights": phase.mixture.weights,
        "epochs": phase.stream.epochs(),
    }


def loss_record(losses: Losses) -> dict[str, dict[str, float | None]]:
    """Losses and errors as in the record of a phase; an unknown error is null."""
    values = to_json(losses)
    return {
        "losses": {name: loss for name, (loss, _) in values.items() if loss is not None},
        "errors": {name: error for name, (_, error) in values.items()},
    }


def earlier_records(context: Context, name: str) -> list[dict[str, Any]]:
    """Records of finished phases before this one, configured or not."""
    found = []
    for phase in PHASES[: PHASES.index(name)]:
        record = context.done(phase)
        if record is not None:
            found.append(record)
    return found


def build_teacher(context: Context, how: DistillationPlan) -> Teacher | None:
    """Build the source on this rank, in the run's dtype, as a teacher; None if the distillation weight is 0.

    Raises:
        ConfigError: A run from scratch has no teacher; `megashear check` reports this too.
    """
    if not how.weight:
        return None
    source, layout = context.source, context.layout
    if source is None:
        raise ConfigError("distillation.weight: a run from scratch has no teacher; set it to 0, or give source.folder")
    core = transformer_config(source.shape, context.config.parallel, context.dtype)
    return Teacher(filled_chunks(source.shape, core, layout, source), how, layout)
