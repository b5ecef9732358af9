"""Estimate memory per rank, one `Memory` per pipeline stage.

Excludes CUDA's context, NCCL's buffers and fragmentation (2 to 4 GiB). Bytes per parameter: weights 2 (bf16) or 4
(fp32); gradients 4, accumulated in fp32; Adam's two moments 8, and 4 for an fp32 master if weights are bf16, divided by
data parallelism under the distributed optimizer. Activations are counted as in Korthikanti et al. 2022 (Reducing
Activation Recomputation), section 4, and a test compares them with what autograd saves; without the compiled kernels
they are 1.5 to 2.7 times as much.
"""

from dataclasses import dataclass, replace

from megashear.config.model_shape import ModelShape
from megashear.config.schema import ParallelConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """Sum in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.teacher


@dataclass(frozen=True)
class Work:
    """Work of a rank in a step.

    Attributes:
        micro_batch: Sequences of a micro-batch.
        micro_batches: Micro-batches of a step.
        sequence_length: Tokens of a sequence.
        teacher: Shape of a frozen teacher, or None.
        chunk: Tokens whose logits are in fp32 at a time during distillation.
    """

    micro_batch: int
    micro_batches: int
    sequence_length: int
    data_parallel: int
    precision: str
    masked: bool
    teacher: ModelShape | None = None
    chunk: int = 256


def stage_memory(shape: ModelShape, parallel: ParallelConfig, work: Work) -> list[Memory]:
    """Memory of a rank of each pipeline stage, in order."""
    return [_memory(shape, parallel, work, stage) for stage in range(parallel.pipeline)]


def one_shot_memory(
    source: ModelShape, target: ModelShape, parallel: ParallelConfig, work: Work, gradients: bool, fits: bool
) -> list[Memory]:
    """Memory of a rank of each pipeline stage during one-shot pruning, which has no optimizer.

    The maximum of evaluating the source, scoring it sequence by sequence, and fitting it. `gradients` is whether a
    criterion needs gradients, `fits` whether output matrices are fitted.
    """
    return [
        max(_one_shot_parts(source, target, parallel, work, stage, gradients, fits), key=lambda part: part.total)
        for stage in range(parallel.pipeline)
    ]


def chunk_layers(num_layers: int, parallel: ParallelConfig, stage: int) -> list[int]:
    """Layers in each model chunk of a pipeline stage; remainders go to earlier chunks."""
    base, extra = divmod(num_layers, parallel.pipeline * parallel.virtual_pipeline)
    parts = [chunk * parallel.pipeline + stage for chunk in range(parallel.virtual_pipeline)]
    return [base + (part < extra) for part in parts]


def rank_parameters(shape: ModelShape, parallel: ParallelConfig, stage: int) -> int:
    """Parameters on a rank of a stage: products and vocabulary split over tensor-parallel ranks, norms replicated."""
    norms = 2 * shape.hidden_size
    layer = (shape.layer_parameters() - norms) // parallel.tensor + norms
    count = layer * sum(chunk_layers(shape.num_layers, parallel, stage))
    vocabulary = shape.padded_vocab_size(parallel.tensor) // parallel.tensor * shape.hidden_size
    first, last = stage == 0, stage == parallel.pipeline - 1
    if first:
        count += vocabulary
    if last:
        count += shape.hidden_size
        if not (first and shape.tie_word_embeddings):  # a tied pipeline holds a copy on its last stage
            count += vocabulary
    return count


def layer_activations(shape: ModelShape, parallel: ParallelConfig, work: Work) -> int:
    """Bytes that one layer keeps for the backward of one micro-batch, without recomputation, with the compiled kernels.

    Elements per token: input and output of both norms 4d, with masks both branches' outputs 2d more, which are divided
    only under sequence parallelism; over tensor-parallel ranks q, k and v (H + 2G) head_dim, attention's output, with
    masks also as it was before its mask, gate, up and their product 3I. Attention keeps 4 bytes a head in place of its
    scores.
    """
    heads, groups = shape.num_heads, shape.num_query_groups
    replicated = _element(work) * (6 if work.masked else 4) * shape.hidden_size
    outputs = 2 * heads if work.masked else heads
    split = _element(work) * ((heads + 2 * groups + outputs) * shape.head_dim + 3 * shape.intermediate_size) + 4 * heads
    per_token = replicated // _sequence_split(parallel) + split // parallel.tensor
    return per_token * work.micro_batch * work.sequence_length


def layers_in_flight(shape: ModelShape, parallel: ParallelConfig, work: Work, stage: int) -> int:
    """Layers, once per micro-batch in flight, whose activations a stage holds at its peak.

    1F1B runs PP - stage - 1 forwards ahead; interleaved with V chunks 2 (PP - stage - 1) + (V - 1) PP chunk forwards
    (Narayanan et al. 2021, section 2.2).
    """
    chunks = chunk_layers(shape.num_layers, parallel, stage)
    behind = parallel.pipeline - stage - 1
    if parallel.virtual_pipeline == 1:
        return chunks[0] * min(behind + 1, work.micro_batches)
    ahead = 2 * behind + (parallel.virtual_pipeline - 1) * parallel.pipeline
    return max(chunks) * min(ahead + 1, work.micro_batches * parallel.virtual_pipeline)


def _memory(shape: ModelShape, parallel: ParallelConfig, work: Work, stage: int) -> Memory:
    count = rank_parameters(shape, parallel, stage)
    tokens = work.micro_batch * work.sequence_length
    optimizer = (12 if work.precision == "bf16" else 8) * count
    if parallel.distributed_optimizer:
        optimizer //= work.data_parallel
    flying = layers_in_flight(shape, parallel, work, stage)
    layer = layer_activations(shape, parallel, work)
    if parallel.recompute == "full":  # every layer's stream and what is to be added to it, and one layer in full
        inputs = 2 * shape.hidden_size * tokens * _element(work) // _sequence_split(parallel)
        activations = flying * inputs + layer
    else:
        activations = flying * layer
    logits = 0
    if stage == parallel.pipeline - 1:  # logits and their gradient, and the softmax in fp32
        logits = (2 * _element(work) + 4) * tokens * shape.padded_vocab_size(parallel.tensor) // parallel.tensor
    return Memory(
        count, _element(work) * count, 4 * count, optimizer, activations, logits, teacher_memory(parallel, work, stage)
    )


def _one_shot_parts(
    source: ModelShape,
    target: ModelShape,
    parallel: ParallelConfig,
    work: Work,
    stage: int,
    gradients: bool,
    fits: bool,
) -> list[Memory]:
    """Memory of evaluating, of scoring with gradients, and of fitting, as far as each is done.

    A fit holds two copies of the source and, for its widest output matrix, sums of outer products in fp64 with their
    increments in fp32 and fp64, complete on every rank.
    """
    single = replace(work, micro_batch=1, micro_batches=work.micro_batch * work.micro_batches)
    scoring = replace(_memory(source, parallel, single, stage), gradients=0, optimizer=0)
    logits = _memory(source, parallel, work, stage).logits
    found = [replace(scoring, activations=layer_activations(source, parallel, work), logits=logits)]
    if gradients:
        found.append(scoring)
    if fits:
        inputs = max(target.intermediate_size, target.num_heads * target.head_dim)
        layer = layer_activations(source, replace(parallel, sequence=False), single)
        sums = 20 * inputs * (inputs + target.hidden_size)
        found.append(replace(scoring, weights=2 * scoring.weights, activations=layer + sums, logits=0))
    return found


def teacher_memory(parallel: ParallelConfig, work: Work, stage: int) -> int:
    """Bytes of a teacher on a rank of a stage: its weights, and its targets on the last stage.

    Targets are the final states of all micro-batches (one of them also gathered under sequence parallelism), and for a
    chunk of tokens logits and five fp32 numbers per vocabulary entry of the rank. Its activations are freed before
    the student's.
    """
    if work.teacher is None:
        return 0
    size = _element(work) * rank_parameters(work.teacher, parallel, stage)
    if stage < parallel.pipeline - 1:
        return size
    tokens = work.micro_batch * work.sequence_length
    states = _element(work) * tokens * work.teacher.hidden_size
    size += work.micro_batches * states // _sequence_split(parallel) + states * (_sequence_split(parallel) > 1)
    columns = work.teacher.padded_vocab_size(parallel.tensor) // parallel.tensor
    return size + min(work.chunk, tokens) * columns * (_element(work) + 5 * 4)


def _element(work: Work) -> int:
    """Bytes of a weight or an activation."""
    return 2 if work.precision == "bf16" else 4


def _sequence_split(parallel: ParallelConfig) -> int:
    """Parts into which activations outside of products are split."""
    return parallel.tensor if parallel.sequence else 1
